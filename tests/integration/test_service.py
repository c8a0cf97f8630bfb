"""The service on a real Ray cluster, with the fake engine: everything above an engine."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import serve

from graphs.sampler import build
from tests.support.command_line import fails, json_of
from tests.support.deploy import deployed
from tests.support.eventually import wait_until
from tests.support.processes import replica_process
from tests.support.service import QUESTIONS, is_idle
from twinkle_serve import SamplingParams, connect
from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import (
    AdapterError,
    DeadlineError,
    PromptError,
    RequestError,
    SamplingParamsError,
    ServiceNotReadyError,
    TwinkleServeError,
)
from twinkle_serve.sampler import RunningSampler

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def sampler(cluster: None) -> Iterator[RunningSampler]:
    """Two engines, instant."""
    args: dict[str, Any] = {"device_mesh": {"dp_size": 2}, "engine_args": {"max_model_len": 600}}
    with deployed("quick", engine="fake", **args) as service:
        yield service


@pytest.fixture(autouse=True)
def nothing_left_behind(sampler: RunningSampler) -> Iterator[None]:
    """After each test the service holds no request and its engines no sequence."""
    yield
    wait_until(functools.partial(is_idle, sampler), "the service is idle")


def test_command_line_by_handle(sampler: RunningSampler) -> None:
    """The application is found by its name, and its engines are drained and used again."""
    by_handle = ("--service", "quick")
    found = json_of("status", *by_handle)
    assert {name: engine["state"] for name, engine in found["engines"].items()} == {
        "engine-dp0": "ready",
        "engine-dp1": "ready",
    }
    options = ("-n", "3", "--max-tokens", "4", "-p", "ignore_eos=true", *by_handle)
    (prompt,) = json_of("sample", "1+1=", *options)["prompts"]
    assert [len(sequence["tokens"]) for sequence in prompt["sequences"]] == [4, 4, 4]
    assert json_of("engines", "drain", "engine-dp0", *by_handle)["done"] == "drained"
    assert sampler.status()["engines"]["engine-dp0"]["state"] == "drained"
    assert json_of("engines", "undrain", "engine-dp0", *by_handle)["engine"] == "engine-dp0"
    wait_until(lambda: sampler.status()["engines"]["engine-dp0"]["state"] == "ready", "the engine is in use again")
    assert json_of("sessions", "list", *by_handle) == {"sessions": []}
    assert json_of("top", *by_handle)["events"]
    assert "nobody" in fails(3, "status", "--service", "nobody")
    assert "nobody" in fails(1, "engines", "drain", "nobody", *by_handle)


def test_sample_returns_every_sample_in_input_order(sampler: RunningSampler) -> None:
    """Flat and prompt-major, from both engines, with the logprobs of each token."""
    response = sampler.sample(QUESTIONS, SamplingParams(max_tokens=20), num_samples=5)
    assert [seq.prompt_index for seq in response.sequences] == [i for i in range(len(QUESTIONS)) for _ in range(5)]
    assert {seq.engine for seq in response.sequences} == {"engine-dp0", "engine-dp1"}
    assert all(len(seq.logprobs or []) == len(seq.tokens) for seq in response.sequences)
    for question, part in zip(QUESTIONS, response, strict=True):
        feature: Any = part.sequences[0].new_input_feature
        assert feature["messages"][0] == question["messages"][0]
        assert feature["messages"][1]["role"] == "assistant"
        assert feature["input_ids"][: len(part.prompt_token_ids)] == part.prompt_token_ids


def test_sample_takes_one_dict_as_one_prompt(sampler: RunningSampler) -> None:
    """It is never split."""
    response = sampler.sample(QUESTIONS[0], {"max_tokens": 3}, num_samples=2)
    assert len(response) == 1 and len(response.sequences) == 2


def test_sample_continues_a_new_input_feature(sampler: RunningSampler) -> None:
    """What came out goes in again, token for token."""
    first = sampler.sample(QUESTIONS[0], {"max_tokens": 3}).sequences[0].new_input_feature
    again = sampler.sample(first, {"max_tokens": 3})
    assert again.prompt_token_ids == first["input_ids"]


def test_a_batch_smaller_than_the_engines_is_answered(sampler: RunningSampler) -> None:
    """And many more prompts than slots as well."""
    assert len(sampler.sample(QUESTIONS[:1], {"max_tokens": 2}).sequences) == 1
    assert len(sampler.sample(QUESTIONS * 100, {"max_tokens": 2}, num_samples=2).sequences) == 2400


def test_sample_iter_yields_each_prompt_once(sampler: RunningSampler) -> None:
    """With all its samples, in whatever order they finish."""
    parts = list(sampler.sample_iter(QUESTIONS, {"max_tokens": 5}, num_samples=3, progress=True))
    assert sorted(part.prompt_index for part in parts) == list(range(len(QUESTIONS)))
    assert {len(part.sequences) for part in parts} == {3}
    assert {seq.prompt_index for part in parts for seq in part.sequences} == set(range(len(QUESTIONS)))
    assert all(part.inputs == [QUESTIONS[part.prompt_index]] for part in parts)


def test_inputs_may_hold_references(sampler: RunningSampler) -> None:
    """To objects and to actors, which come back with them, and are let go of as Ray's own."""

    @ray.remote(num_cpus=0)
    class Judge:
        def score(self) -> float:
            return 1.0

    data = {"gold": ray.put("46"), "judge": Judge.remote()}  # type: ignore[attr-defined]
    response = sampler.sample([{**QUESTIONS[0], "user_data": data}], {"max_tokens": 2})
    back = response.sequences[0].new_input_feature["user_data"]
    assert ray.get(back["gold"]) == "46" and ray.get(back["judge"].score.remote()) == 1.0
    alone = sampler.sample([{**QUESTIONS[0], "user_data": data["judge"]}], {"max_tokens": 2})
    assert ray.get(alone.inputs[0]["user_data"].score.remote()) == 1.0


def test_handle_is_called_from_other_actors(sampler: RunningSampler) -> None:
    """From an async actor by handle and by connect, and from a plain one by connect."""

    @ray.remote(num_cpus=0)
    class AsyncTrainer:
        async def rollout(self) -> tuple[list[str], list[str], int]:
            params = SamplingParams(max_tokens=4, temperature=0)
            by_handle = await serve.get_app_handle("quick").sample.remote(QUESTIONS, params, num_samples=2)
            by_connect = await connect("quick").sample_async(QUESTIONS, params, num_samples=2)
            parts = [part async for part in connect("quick").sample_iter_async(QUESTIONS, params)]
            assert by_handle.inputs == by_connect.inputs == QUESTIONS
            assert all(part.inputs == [QUESTIONS[part.prompt_index]] for part in parts)
            bare = await serve.get_app_handle("quick").sample.remote(QUESTIONS, params, return_inputs=False)
            assert not bare.inputs and len(bare.sequences) == len(QUESTIONS)
            return [s.decoded for s in by_handle.sequences], [s.decoded for s in by_connect.sequences], len(parts)

    @ray.remote(num_cpus=0)
    class Trainer:
        def rollout(self) -> list[str]:
            params = SamplingParams(max_tokens=4, temperature=0)
            return [s.decoded for s in connect("quick").sample(QUESTIONS, params, num_samples=2).sequences]

    trainers: Any = (AsyncTrainer, Trainer)
    rollouts = [trainer.remote().rollout.remote() for trainer in trainers]
    (by_handle, by_connect, parts), by_plain = ray.get(rollouts)
    assert by_handle == by_connect == by_plain
    assert len(by_handle) == 24 and parts == 12


async def test_many_calls_at_once_share_chunks_and_keep_apart(sampler: RunningSampler) -> None:
    """Two hundred callers of one prompt, of different parameters, each get their own answer."""
    ks = [None, 0, 2]
    calls = [
        sampler.sample_async(QUESTIONS[i % 12], {"max_tokens": 1 + i % 5, "ignore_eos": True, "logprobs": ks[i % 3]})
        for i in range(200)
    ]
    for i, response in enumerate(await asyncio.gather(*calls)):
        (sequence,) = response.sequences
        assert len(sequence.tokens) == 1 + i % 5
        assert (sequence.logprobs is None) == (ks[i % 3] is None)


@pytest.mark.nightly
@pytest.mark.parametrize("dp_size", [1, 4])
def test_seed_gives_the_same_samples_for_any_number_of_engines(sampler: RunningSampler, dp_size: int) -> None:
    """One and four engines against two; tests/unit/test_seeds.py does the same in one process."""
    params = SamplingParams(max_tokens=12, seed=77)
    two = sampler.sample(QUESTIONS, params, num_samples=3)
    with deployed("other", engine="fake", device_mesh={"dp_size": dp_size}) as service:
        other = service.sample(QUESTIONS, params, num_samples=3)
    assert [seq.tokens for seq in other.sequences] == [seq.tokens for seq in two.sequences]
    assert [seq.seed for seq in other.sequences] == [seq.seed for seq in two.sequences]


def test_seed_is_stamped_on_each_sample_and_no_layout_changes_it(sampler: RunningSampler) -> None:
    """More samples of fewer prompts, on other engines, begin with the same ones; another seed gives others."""
    params = SamplingParams(max_tokens=12, seed=77)
    two = sampler.sample(QUESTIONS, params, num_samples=3)
    assert len({seq.seed for seq in two.sequences}) == 36
    alone = sampler.sample(QUESTIONS[:1], params, num_samples=9)
    assert [seq.tokens for seq in alone.sequences[:3]] == [seq.tokens for seq in two.sequences[:3]]
    assert [s.tokens for s in sampler.sample(QUESTIONS, {"max_tokens": 12, "seed": 78}).sequences] != [
        part.sequences[0].tokens for part in two
    ]


def test_without_a_seed_no_two_samples_repeat_each_other(sampler: RunningSampler) -> None:
    """Within a group split over both engines, and from call to call."""
    params = {"max_tokens": 16, "ignore_eos": True}
    responses = [sampler.sample(QUESTIONS[0], params, num_samples=16) for _ in range(3)]
    assert {seq.seed for response in responses for seq in response.sequences} == {None}
    counts = Counter(tuple(seq.tokens) for response in responses for seq in response.sequences)
    assert max(counts.values()) == 1


BAD_CALLS: list[tuple[dict[str, Any], type[TwinkleServeError], str]] = [
    ({"inputs": []}, PromptError, "inputs is empty"),
    ({"inputs": [QUESTIONS[0], {"input_ids": [1]}]}, PromptError, "mixes kinds"),
    ({"inputs": {"input_ids": [1] * 600}}, PromptError, "has 600 tokens, the context holds 600"),
    ({"inputs": {"input_ids": [1, 320]}}, PromptError, "token id 320, the model's vocabulary is 0 to 319"),
    ({"inputs": {"input_ids": []}}, PromptError, "is empty"),
    ({"inputs": QUESTIONS, "sampling_params": {"temperature": float("nan")}}, SamplingParamsError, "must be finite"),
    ({"inputs": QUESTIONS, "sampling_params": {"max_tokns": 1}}, SamplingParamsError, "did you mean 'max_tokens'"),
    ({"inputs": QUESTIONS, "sampling_params": {"logprobs": 99}}, SamplingParamsError, "at most 20"),
    ({"inputs": QUESTIONS, "num_samples": 0}, SamplingParamsError, "num_samples must be at least 1"),
    ({"inputs": QUESTIONS, "num_samples": 2**21}, SamplingParamsError, "num_samples must be at most 1048576"),
    ({"inputs": QUESTIONS, "adapter_name": "mine"}, AdapterError, "unknown adapter 'mine'"),
    ({"inputs": QUESTIONS, "timeout_s": -1}, RequestError, "timeout_s must be a number of seconds above 0, got -1"),
    ({"inputs": QUESTIONS, "timeout_s": "5"}, RequestError, "timeout_s must be a number of seconds above 0, got '5'"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[message for _, _, message in BAD_CALLS])
def test_bad_call_raises_a_typed_error_and_the_next_one_works(
    sampler: RunningSampler, call: dict[str, Any], error: type[TwinkleServeError], message: str
) -> None:
    """At once, by connect and by handle, in sample and in sample_iter; a bystander finishes."""
    bystander = serve.get_app_handle("quick").sample.remote(QUESTIONS, {"max_tokens": 50}, num_samples=4)
    with pytest.raises(error) as caught:
        sampler.sample(**call)
    assert message in str(caught.value) and "Traceback" not in str(caught.value)
    with pytest.raises(error):
        serve.get_app_handle("quick").sample.remote(**call).result()
    with pytest.raises(error):
        list(sampler.sample_iter(**call))
    assert len(bystander.result().sequences) == 48
    assert len(sampler.sample(QUESTIONS[0], {"max_tokens": 2}).sequences) == 1


def test_handle_takes_every_parameter(sampler: RunningSampler) -> None:
    """One for each prompt, as the sampler does."""
    each: list[dict[str, Any]] = [
        {"max_tokens": 3, "seed": 1, "top_k": 5, "logprobs": 2},
        {"max_tokens": 6, "seed": 2, "min_p": 0.1, "n": 2},
    ]
    handle = serve.get_app_handle("quick")
    response = handle.sample.remote(QUESTIONS[:2], each).result(timeout_s=60)
    expected = sampler.sample(QUESTIONS[:2], each)
    assert [sequence.tokens for sequence in response.sequences] == [sequence.tokens for sequence in expected.sequences]
    with pytest.raises(SamplingParamsError, match="min_p"):
        handle.sample.remote(QUESTIONS[:1], {"min_p": 2}).result(timeout_s=60)


def test_connect_names_the_likely_application(sampler: RunningSampler) -> None:
    """Where there is none of the name."""
    with pytest.raises(ServiceNotReadyError, match="unknown application 'quik', did you mean 'quick'"):
        connect("quik")


@pytest.mark.nightly
def test_connect_to_an_application_that_failed_says_why(sampler: RunningSampler) -> None:
    """At once."""
    too_long = {"engine": "torch", "engine_args": {"max_model_len": 99_999}}
    args = ServiceArgs.model_validate({"model_id": "demo", "device_mesh": {"device_type": "cpu"}, **too_long})
    with pytest.raises(RuntimeError):
        serve.run(build(args), name="broken", route_prefix=None)
    started = time.monotonic()
    with pytest.raises(
        ServiceNotReadyError, match=r"'broken' is DEPLOY_FAILED: EngineArgsError: .* has 4096 positions"
    ):
        connect("broken")
    assert time.monotonic() - started < 20
    serve.delete("broken")


def test_caller_does_not_wait_for_ever_when_the_router_does_not_answer(
    sampler: RunningSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the call's deadline and some grace it raises, in every way of calling; the next call works."""
    monkeypatch.setattr("twinkle_serve.timing.ROUTER_GRACE_S", 0.5)
    router = replica_process("quick", "router")
    router.suspend()
    try:
        for call in (
            lambda: sampler.sample(QUESTIONS, timeout_s=0.5),
            lambda: list(sampler.sample_iter(QUESTIONS, timeout_s=0.5)),
            lambda: list(sampler.sample_stream(QUESTIONS[0], timeout_s=0.5)),
            lambda: asyncio.run(sampler.sample_async(QUESTIONS, timeout_s=0.5)),
        ):
            with pytest.raises(DeadlineError, match=r"did not say so within 0.5 s"):
                call()
    finally:
        router.resume()
    assert len(sampler.sample(QUESTIONS).sequences) == len(QUESTIONS)
