"""Guarantees of every sampler: vllm, torch and fake, in this process and as a service with dp_size 2."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.samplers import GREEDY, QUESTIONS, make_sampler, tokens
from twinkle_serve import SamplingParams, Template
from twinkle_serve.errors import (
    AdapterError,
    DeadlineError,
    PromptError,
    RequestError,
    SamplingParamsError,
    TemplateError,
    TwinkleServeError,
    UnsupportedError,
)
from twinkle_serve.sampler import RunningSampler


@pytest.fixture(scope="module")
def reference() -> Iterator[RunningSampler]:
    """The torch engine in this process."""
    sampler = make_sampler("torch")
    yield sampler
    sampler.shutdown()


def test_sampler_answers_flat_and_prompt_by_prompt(sampler: RunningSampler) -> None:
    """One response serves both versions of the API: p0s0, p0s1, p1s0, …, and one response per prompt."""
    response = sampler.sample(QUESTIONS, SamplingParams(max_tokens=6), num_samples=3)
    assert [sequence.prompt_index for sequence in response.sequences] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(response) == 3
    for i, part in enumerate(response):
        assert tokens(part) == tokens(response)[3 * i : 3 * i + 3]
        assert part.prompt_token_ids == part.sequences[0].new_input_feature["input_ids"][: len(part.prompt_token_ids)]
    assert all([lp[0][0] for lp in seq.logprobs or []] == seq.tokens for seq in response.sequences)


def test_sampler_takes_parameters_in_either_place(sampler: RunningSampler) -> None:
    """num_samples and logprobs inside sampling_params, as a dict with upstream's aliases, or as arguments."""
    inside = sampler.sample(QUESTIONS[:1], {"max_new_tokens": 4, "num_samples": 2, "logprobs": 3, "seed": 7})
    outside = sampler.sample(QUESTIONS[:1], SamplingParams(max_tokens=4, seed=7), num_samples=2, logprobs=3)
    assert tokens(inside) == tokens(outside)
    assert [len(seq.logprobs[0]) >= 3 for seq in inside.sequences if seq.logprobs] == [True, True]
    assert sampler.sample(QUESTIONS[:1], {"max_tokens": 2}, logprobs=None).sequences[0].logprobs is None
    with pytest.raises(SamplingParamsError, match="num_samples=3 in the call contradicts num_samples=2"):
        sampler.sample(QUESTIONS, {"num_samples": 2}, num_samples=3)


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_sampler_takes_ids_of_any_kind(sampler: RunningSampler, kind: Any) -> None:
    """Lists, numpy and torch; the response is the same, and the input is unchanged."""
    ids = sampler.sample(QUESTIONS[0], GREEDY).prompt_token_ids
    feature = {"input_ids": kind(ids), "attention_mask": kind([1] * len(ids)), "user_data": {"id": [1]}}
    before = copy.deepcopy(feature)
    response = sampler.sample([feature], GREEDY)
    assert tokens(response) == tokens(sampler.sample(QUESTIONS[0], GREEDY))
    assert response.sequences[0].new_input_feature["user_data"] == {"id": [1]}
    assert feature.keys() == before.keys() and list(feature["input_ids"]) == list(before["input_ids"])


def test_sampler_encodes_and_decodes_what_it_samples(sampler: RunningSampler) -> None:
    """Ids of inputs are the prompts, texts of tokens are `decoded`; one list of ids has one text."""
    response = sampler.sample(QUESTIONS, {"max_tokens": 6, "ignore_eos": True}, num_samples=2)
    ids = [part.prompt_token_ids for part in response]
    assert sampler.encode(QUESTIONS) == ids and sampler.encode(QUESTIONS[0]) == ids[:1]
    assert sampler.count_tokens([{"input_ids": np.asarray(each)} for each in ids]) == [*map(len, ids)]
    assert sampler.decode(tokens(response)) == [sequence.decoded for sequence in response.sequences]
    assert sampler.decode(torch.tensor(ids[0])) == sampler.decode(ids)[0] and sampler.decode([]) == ""
    for call in (lambda: sampler.encode([*QUESTIONS, {"messages": []}]), lambda: sampler.decode([[0], [10**6]])):
        with pytest.raises(PromptError):
            call()


def test_sampler_repeats_a_seed_in_any_batch(sampler: RunningSampler) -> None:
    """The first prompt alone or beside others, on one engine or two: the same samples. Another seed gives others."""
    params = SamplingParams(max_tokens=8, temperature=1.5, seed=11, ignore_eos=True)
    together = sampler.sample(QUESTIONS, params, num_samples=4)
    assert tokens(sampler.sample(QUESTIONS, params, num_samples=4)) == tokens(together)
    assert tokens(sampler.sample(QUESTIONS[:1], params, num_samples=4)) == tokens(together[0])
    other = SamplingParams(max_tokens=8, temperature=1.5, seed=12, ignore_eos=True)
    assert tokens(sampler.sample(QUESTIONS, other, num_samples=4)) != tokens(together)
    assert len({tuple(row) for row in tokens(together)}) > 3


def test_sampler_iterates_prompt_by_prompt(sampler: RunningSampler) -> None:
    """Each prompt once with all its samples; an abandoned iterator leaves nothing behind."""
    parts = list(sampler.sample_iter(QUESTIONS, {"max_tokens": 4}, num_samples=2))
    assert sorted(part.prompt_index for part in parts) == [0, 1, 2]
    assert [len(part.sequences) for part in parts] == [2, 2, 2]
    abandoned = sampler.sample_iter(QUESTIONS, {"max_tokens": 100, "ignore_eos": True}, num_samples=2)
    next(abandoned)
    del abandoned
    assert tokens(sampler.sample(QUESTIONS[0], GREEDY))


def test_sampler_works_in_async_code(sampler: RunningSampler) -> None:
    """Calls run concurrently, with the same results as blocking calls."""

    async def run() -> tuple[Any, Any, str]:
        both = await asyncio.gather(*(sampler.sample_async(question, GREEDY) for question in QUESTIONS[:2]))
        parts = [part async for part in sampler.sample_iter_async(QUESTIONS, GREEDY)]
        text = "".join([delta async for delta, _ in sampler.sample_stream_async(QUESTIONS[0], GREEDY)])
        return both, sorted(parts, key=lambda part: part.prompt_index), text

    both, parts, text = asyncio.run(run())
    expected = sampler.sample(QUESTIONS, GREEDY)
    assert [tokens(response)[0] for response in both] == tokens(expected)[:2]
    assert [tokens(part)[0] for part in parts] == tokens(expected)
    assert text == expected.sequences[0].decoded


def test_sampler_streams_text_as_it_is_sampled(sampler: RunningSampler) -> None:
    """(delta_text, finish_reason): joined, the sample's text. A reader that leaves does not block the sampler."""
    params = {"max_tokens": 20, "ignore_eos": True, "seed": 4}
    whole = sampler.sample(QUESTIONS[1], params).sequences[0]
    deltas = list(sampler.sample_stream(QUESTIONS[1], params))
    assert "".join(text for text, _ in deltas) == whole.decoded
    assert [reason for _, reason in deltas] == [None] * (len(deltas) - 1) + [whole.stop_reason]
    for _ in range(3):
        leaving = sampler.sample_stream(QUESTIONS[1], {"max_tokens": 200, "ignore_eos": True})
        next(leaving)
        del leaving
    assert tokens(sampler.sample(QUESTIONS[1], params)) == [whole.tokens]
    with pytest.raises(RequestError, match="one prompt and one sample, got 3 and 1"):
        next(sampler.sample_stream(QUESTIONS, params))


def test_sampler_scores_given_sequences(sampler: RunningSampler) -> None:
    """A sample's own logprobs are reproduced, for ids and for messages; top_logprobs are sorted best first."""
    response = sampler.sample(QUESTIONS, {"max_tokens": 8, "seed": 3, "ignore_eos": True})
    features = [sequence.new_input_feature for sequence in response.sequences]
    scored = sampler.score([{"input_ids": feature["input_ids"]} for feature in features], top_logprobs=2)
    assert len(scored) == 3 and tokens(scored) == [[], [], []]
    for part, sequence in zip(scored, response.sequences, strict=True):
        assert part.prompt_logprobs is not None and part.topk_prompt_logprobs is not None
        assert part.prompt_logprobs[0] is None and len(part.prompt_logprobs) == len(part.prompt_token_ids)
        given = np.array(part.prompt_logprobs[-8:], np.float32)
        assert np.abs(given - sequence.logprob_array).max() < 1e-3  # type: ignore[operator]
        assert all(top[0][1] >= top[1][1] for top in part.topk_prompt_logprobs[1:] if top)
    said = {"messages": [*QUESTIONS[0]["messages"], {"role": "assistant", "content": "46"}]}
    assert sampler.score(said).prompt_token_ids[-4:] == [22, 24, 2, 201], "no turn is opened for the assistant"


def test_sampler_has_its_own_template(sampler: RunningSampler) -> None:
    """By name, class or instance, for this object's calls only. Invalid templates are refused and change nothing."""
    plain = sampler.sample(QUESTIONS[0], GREEDY).prompt_token_ids
    sampler.set_template("Template", system="Be exact.")
    with_system = sampler.sample(QUESTIONS[0], GREEDY).prompt_token_ids
    assert len(with_system) > len(plain) and with_system[-len(plain) :] == plain

    class Shouting(Template):
        def render(self, messages: Any, tools: Any, *, generation_prompt: bool = True) -> str:
            return super().render(messages, tools, generation_prompt=generation_prompt) + "!"

    sampler.set_template(Shouting)
    assert sampler.sample(QUESTIONS[0], GREEDY).prompt_token_ids[: len(plain)] == plain
    from twinkle_serve import hub

    sampler.set_template(Template(hub.DEMO, max_length=5, truncation_strategy="left"))
    assert sampler.sample(QUESTIONS[0], GREEDY).prompt_token_ids == plain[-5:]
    for bad, kwargs in (("Nonsense", {}), ("Template", {"max_lenght": 3}), ("Template", {"enable_thinking": True})):
        with pytest.raises(TemplateError):
            sampler.set_template(bad, **kwargs)
    assert sampler.sample(QUESTIONS[0], GREEDY).prompt_token_ids == plain[-5:]
    sampler.set_template("Template", model_id="demo")
    assert sampler.sample(QUESTIONS[0], GREEDY).prompt_token_ids == plain


def test_sampler_deletes_prompts_that_are_too_long_with_that_strategy(sampler: RunningSampler) -> None:
    """The others keep their indices in the call, and their seeds."""
    sampler.set_template("Template", max_length=14, truncation_strategy="delete")
    params = {"max_tokens": 4, "seed": 5, "temperature": 1.0}
    kept = sampler.sample(QUESTIONS, params)
    sampler.set_template("Template")
    everything = sampler.sample(QUESTIONS, params)
    lengths = [len(part.prompt_token_ids) for part in everything]
    assert kept.prompt_indices == tuple(i for i, length in enumerate(lengths) if length <= 14) != (0, 1, 2)
    assert [tokens(part) for part in kept] == [tokens(everything[i]) for i in kept.prompt_indices]
    assert kept.inputs == [QUESTIONS[i] for i in kept.prompt_indices]


def test_sampler_keeps_tokens_over_several_turns(sampler: RunningSampler) -> None:
    """A turn's ids are a prefix of the next turn's prompt; labels of all turns are kept."""
    feature: Any = QUESTIONS[0]
    ids: list[int] = []
    for turn in range(3):
        before = copy.deepcopy(feature)
        sequence = sampler.sample(feature, {"max_tokens": 5, "temperature": 1.0, "seed": turn}).sequences[0]
        assert sequence.response.prompt_token_ids[: len(ids)] == ids
        following: Any = sequence.new_input_feature
        assert feature == before, "an input was changed"
        feature, ids = following, following["input_ids"]
        assert len(feature["messages"]) == 2 * turn + 2
        labels = [label for label in feature["labels"] if label != -100]
        assert labels[-len(sequence.tokens) :] == sequence.tokens
        feature = {**feature, "messages": [*feature["messages"], {"role": "user", "content": f"{turn}+1="}]}


def test_sampler_verifies_its_samples_against_itself(sampler: RunningSampler, adapters: list[Path], name: str) -> None:
    """Base and adapter, several samples per prompt, parts of a response. Other weights are detected."""
    sampler.add_adapter_to_model(name, adapters[0])
    params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    for which in ("", name):
        response = sampler.sample(QUESTIONS, params, which, num_samples=2)
        result = sampler.verify(response, against=sampler)
        assert result.tokens == 48 and result.max_abs_difference < 1e-3 and 0 <= result.kl < 1e-5
        assert sampler.verify(response[1], against=sampler).tokens == 16
    wrong = sampler.verify(response, against=sampler, adapter_name="")
    assert wrong.max_abs_difference > 0.05 and wrong.kl > 1e-3
    scored = sampler.score([{"input_ids": seq.new_input_feature["input_ids"]} for seq in response.sequences])
    base = np.concatenate([part.prompt_logprobs[-8:] for part in scored])  # type: ignore[index]
    difference = base - response.columns.logprobs[:, 0]  # type: ignore[index]
    assert wrong.max_abs_difference == pytest.approx(np.abs(difference).max(), abs=1e-3)
    assert wrong.mean_abs_difference == pytest.approx(np.abs(difference).mean(), abs=1e-3)
    assert wrong.kl == pytest.approx((np.exp(difference) - 1 - difference).mean(), rel=1e-2)
    prompt, sample, token = wrong.worst
    assert np.abs(difference).reshape(3, 2, 8)[prompt, sample, token] == pytest.approx(
        wrong.max_abs_difference, abs=1e-3
    )
    sampler.add_adapter_to_model(name, adapters[1])
    with pytest.raises(AdapterError, match=f"{name}@1"):  # dropped, and the newer version has not sampled them
        sampler.verify(response, against=sampler)
    with pytest.raises(RequestError, match="no logprobs to verify"):
        sampler.verify(sampler.sample(QUESTIONS, params, logprobs=None), against=sampler)
    sampler.remove_adapter(name)


def test_sampler_verifies_against_a_second_engine(
    sampler: RunningSampler, reference: RunningSampler, adapters: list[Path], name: str
) -> None:
    """The torch engine in float32 agrees on all samples, base and adapter; versions are never mixed up."""
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    if next(iter(sampler.status()["engines"].values()))["engine"] == "fake":
        assert sampler.verify(sampler.sample(QUESTIONS, params), against=reference).max_abs_difference > 0.05
        return
    sampler.add_adapter_to_model(name, adapters[0])
    reference.add_adapter_to_model(name, adapters[0])
    responses = [sampler.sample(QUESTIONS, params, which, num_samples=2) for which in ("", name)]
    for response in responses:
        result = sampler.verify(response, against=reference)
        assert result.tokens == 72
        assert result.mean_abs_difference <= result.max_abs_difference < 1e-3 and 0 <= result.kl < 1e-5
    assert sampler.verify(responses[1], against=reference, adapter_name="").max_abs_difference > 0.05
    for used in (sampler, reference):
        used.remove_adapter(name)


def test_sampler_answers_control_calls(sampler: RunningSampler) -> None:
    """Weight names, prefix cache, and sleep, which an engine without it refuses; the next call works."""
    assert "model.layers.0.self_attn.q_proj.weight" in sampler.get_state_keys()
    before = sampler.sample(QUESTIONS, GREEDY)
    sampler.reset_prefix_cache()
    if next(iter(sampler.status()["engines"].values()))["engine"] == "fake":
        sampler.sleep()
        with pytest.raises(RequestError, match="asleep"):
            sampler.sample(QUESTIONS, GREEDY)
        sampler.wake_up()
        with pytest.raises(RequestError, match="level must be 1"):
            sampler.sleep(3)
    else:
        for call in (sampler.sleep, sampler.wake_up):
            with pytest.raises(UnsupportedError):
                call()
    assert tokens(sampler.sample(QUESTIONS, GREEDY)) == tokens(before)


@pytest.mark.parametrize(
    ("inputs", "params", "error"),
    [
        ([], {}, PromptError),
        ("12+34=", {}, PromptError),
        ([{"messages": []}], {}, PromptError),
        ([{"input_ids": []}], {}, PromptError),
        ([{"input_ids": [5, 99999]}], {}, PromptError),
        ([{"input_ids": [5] * 5000}], {}, PromptError),
        ([{"input_ids": [[5, 6]]}], {}, PromptError),
        ([QUESTIONS[0], {"input_ids": [5]}], {}, PromptError),
        ([{**QUESTIONS[0], "user_data": threading.Lock()}], {}, PromptError),
        (QUESTIONS, {"temperature": float("nan")}, SamplingParamsError),
        (QUESTIONS, {"temperature": -1}, SamplingParamsError),
        (QUESTIONS, {"top_p": 0}, SamplingParamsError),
        (QUESTIONS, {"max_tokns": 3}, SamplingParamsError),
        (QUESTIONS, {"logprobs": 10_000}, SamplingParamsError),
        (QUESTIONS, {"stop": [""]}, SamplingParamsError),
    ],
)
def test_sampler_refuses_bad_calls_and_still_works(
    sampler: RunningSampler, inputs: Any, params: dict[str, Any], error: type[TwinkleServeError]
) -> None:
    """A typed error at once from every kind of call; the next call works."""
    with pytest.raises(error):
        sampler.sample(inputs, params)
    with pytest.raises(error):
        next(sampler.sample_iter(inputs, params))
    assert len(tokens(sampler.sample(QUESTIONS, {"max_tokens": 1}))) == 3


def test_sampler_enforces_a_deadline(sampler: RunningSampler) -> None:
    """timeout_s ends every kind of call that takes longer; the next call works."""
    endless = {"max_tokens": 200, "ignore_eos": True}
    with pytest.raises(DeadlineError, match=r"timeout_s=0\.001"):
        sampler.sample(QUESTIONS * 20, endless, num_samples=4, timeout_s=0.001)
    with pytest.raises(DeadlineError, match=r"timeout_s=0\.001"):
        list(sampler.sample_iter(QUESTIONS * 20, endless, num_samples=4, timeout_s=0.001))
    with pytest.raises(DeadlineError, match=r"timeout_s=0\.001"):
        list(sampler.sample_stream(QUESTIONS[0], endless, timeout_s=0.001))
    assert len(tokens(sampler.sample(QUESTIONS, {"max_tokens": 1}))) == 3


def test_parameters_at_the_bounds_are_honoured_and_beyond_them_refused(sampler: RunningSampler) -> None:
    """What float32 cannot hold would leave no token, or garbage; so would a stop id that the model does not have."""
    greedy = tokens(sampler.sample(QUESTIONS[0], GREEDY))
    for bound in ({"top_p": 1e-30}, {"repetition_penalty": 1e-30}, {"repetition_penalty": 1e30}, {"top_k": 2**31 - 1}):
        response = sampler.sample(QUESTIONS[0], {**GREEDY, "temperature": 1.0, **bound})
        assert response.columns.logprobs is not None and np.isfinite(response.columns.logprobs).all()
        assert "top_p" not in bound or tokens(response) == greedy
    for beyond in ({"top_p": 1e-46}, {"repetition_penalty": 1e-300}, {"top_k": 2**31}, {"stop": [5, 10**6]}):
        with pytest.raises(SamplingParamsError, match=str(*beyond)):
            sampler.sample(QUESTIONS[0], {"max_tokens": 2, **beyond})
