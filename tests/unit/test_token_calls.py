"""encode, decode and count_tokens: the service's tokenizer and template, without an engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ray import serve
from ray.exceptions import ActorDiedError

from tests.support.eventually import eventually, wait_until
from tests.support.local_sampler import QUESTION, make, soon
from tests.support.router_handle import RouterHandle
from twinkle_serve import Template
from twinkle_serve.data_format.inputs import PackedInputs, as_list
from twinkle_serve.data_format.token_lists import TokenLists
from twinkle_serve.errors import DeadlineError, EngineDeadError, PromptError, RequestError, TemplateError
from twinkle_serve.routing.tokenization import PIECE
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler import client as client_module
from twinkle_serve.sampler.client import ServiceClient
from twinkle_serve.sampler.local import ENGINE

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(3 * PIECE)]
BEGUN = {"messages": [*QUESTION["messages"], {"role": "assistant", "content": "4"}]}
ONE = {"max_tokens": 1}


def prompts(sampler: RunningSampler, inputs: Any, **options: Any) -> list[list[int]]:
    return [response.prompt_token_ids for response in sampler.sample(inputs, ONE, **options)]


def grown(sampler: RunningSampler) -> Any:
    """An input feature with a message that its ids do not hold."""
    feature: Any = sampler.sample(QUESTION, {"max_tokens": 4}).sequences[0].new_input_feature
    feature["messages"].append({"role": "user", "content": "1+1="})
    return feature


@pytest.mark.parametrize(
    "inputs",
    [
        QUESTION,
        QUESTIONS,
        QUESTIONS[: PIECE + 1],
        {"input_ids": [5, 6, 7]},
        [{"input_ids": np.array([5, 6])}, {"input_ids": torch.tensor([7])}, {"input_ids": [8]}],
        np.array([{"input_ids": [5]}], object).tolist(),
        tuple(QUESTIONS[:2]),
    ],
    ids=["one", "many", "more than a piece", "ids", "arrays", "object", "tuple"],
)
def test_ids_are_the_prompts_that_would_be_sampled_from(sampler: RunningSampler, inputs: Any) -> None:
    """Of inputs of any kind: a list for each, of plain numbers, and their counts."""
    expected = prompts(sampler, inputs)
    ids = sampler.encode(inputs)
    assert ids == expected and type(ids) is list
    assert {type(number) for each in ids for number in each} == {int} and {*map(type, ids)} == {list}
    assert sampler.count_tokens(inputs) == [*map(len, expected)]
    assert asyncio.run(sampler.encode_async(inputs)) == expected
    assert asyncio.run(sampler.count_tokens_async(inputs)) == [*map(len, expected)]


def test_ids_of_a_feature_hold_the_messages_that_follow_it(sampler: RunningSampler) -> None:
    feature = grown(sampler)
    (ids,) = sampler.encode(feature)
    assert [ids] == prompts(sampler, feature)
    assert ids[: len(feature["input_ids"])] == feature["input_ids"] and len(ids) > len(feature["input_ids"])


def test_options_are_those_of_the_calls_that_sample_and_score(sampler: RunningSampler) -> None:
    """continue_final_message as in `sample`, add_generation_prompt=False as `score`."""
    assert sampler.encode(BEGUN, continue_final_message=True) == prompts(sampler, BEGUN, continue_final_message=True)
    scored = [response.prompt_token_ids for response in sampler.score([QUESTION, BEGUN])]
    assert sampler.encode([QUESTION, BEGUN], add_generation_prompt=False) == scored
    assert sampler.count_tokens([QUESTION, BEGUN], add_generation_prompt=False) == [*map(len, scored)]
    assert scored[:1] != sampler.encode(QUESTION)


def test_template_is_that_of_the_sampler_object(sampler: RunningSampler) -> None:
    """Also where it is a class of the caller's own; another sampler object keeps its own."""
    before = sampler.encode(QUESTION)
    other = RunningSampler(sampler._client)
    for template, options in (("Template", {"system": "Add."}), (Shouting, {})):
        sampler.set_template(template, **options)
        assert sampler.encode(QUESTION) == prompts(sampler, QUESTION) != before
        assert sampler.count_tokens(QUESTION) == [len(sampler.encode(QUESTION)[0])]
        assert other.encode(QUESTION) == before
    assert sampler.decode([5, 6]) == other.decode([5, 6]).upper() + "!"


class Shouting(Template):
    """A template of a caller's own."""

    def render(self, messages: Any, tools: Any, *, generation_prompt: bool = True) -> str:
        return super().render(messages, tools, generation_prompt=generation_prompt) + "!!!"

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        return super().decode(ids, skip_special_tokens=skip_special_tokens).upper() + "!"


@pytest.mark.parametrize(
    ("inputs", "options", "error"),
    [
        ([], {}, PromptError),
        ("text", {}, PromptError),
        (None, {}, PromptError),
        ([QUESTION, {"input_ids": [1]}], {}, PromptError),
        ([*QUESTIONS[: PIECE + 3], {"messages": []}], {}, PromptError),
        ([{"input_ids": [1]}, {"input_ids": [1, -1]}], {}, PromptError),
        ([{"input_ids": [[1]]}], {}, PromptError),
        ([QUESTION, {"messages": [{"role": "user", "content": "1"}], "images": ["a"]}], {}, PromptError),
        (BEGUN, {}, PromptError),
        (QUESTION, {"continue_final_message": True}, PromptError),
        (QUESTION, {"continue_final_message": 1}, RequestError),
        ([{"messages": [{"role": "user", "content": threading.Lock()}]}], {}, PromptError),
    ],
)
def test_invalid_inputs_are_refused_as_by_sample(
    sampler: RunningSampler, inputs: Any, options: dict[str, Any], error: type[RequestError]
) -> None:
    """The same error with the same index; the next call works."""
    with pytest.raises(error) as expected:
        sampler.sample(inputs, ONE, **options)
    asynchronous = sampler.encode_async(inputs, **options), sampler.count_tokens_async(inputs, **options)
    calls: list[Callable[[], object]] = [
        lambda: sampler.encode(inputs, **options),
        lambda: sampler.count_tokens(inputs, **options),
        *(lambda call=call: asyncio.run(call) for call in asynchronous),
    ]
    for call in calls:
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == str(expected.value)
    assert sampler.count_tokens({"input_ids": [1, 2]}) == [2]


def test_invalid_flags_are_refused(sampler: RunningSampler) -> None:
    wrong: Any = 1
    with pytest.raises(RequestError, match="add_generation_prompt must be true or false, got 1"):
        sampler.encode(QUESTION, add_generation_prompt=wrong)
    with pytest.raises(RequestError, match="skip_special_tokens must be true or false, got 1"):
        sampler.decode([1], skip_special_tokens=wrong)


def test_long_inputs_are_treated_as_by_sample(sampler: RunningSampler) -> None:
    """Cut, refused, or left out: then they have no ids, and the others keep their places."""
    inputs = [{"input_ids": list(range(5, 5 + length))} for length in (3, 9, 4, 8)]
    for side in ("left", "right"):
        sampler.set_template("Template", max_length=4, truncation_strategy=side)
        assert sampler.encode(inputs) == prompts(sampler, inputs)
    sampler.set_template("Template", max_length=4)
    with pytest.raises(PromptError, match=r"inputs\[1\] has 9 tokens, max_length is 4"):
        sampler.count_tokens(inputs)
    sampler.set_template("Template", max_length=4, truncation_strategy="delete")
    assert sampler.encode(inputs) == [[5, 6, 7], [], [5, 6, 7, 8], []]
    assert sampler.count_tokens(inputs) == [3, 0, 4, 0]
    with pytest.raises(PromptError, match="each of the 2 inputs is longer than max_length=4"):
        sampler.encode(inputs[1::2])


def test_length_of_the_context_is_for_sample_to_check(sampler: RunningSampler) -> None:
    """A caller counts tokens to find out what fits."""
    assert sampler.count_tokens({"input_ids": [5] * 5000}) == [5000]


# -- in the router -------------------------------------------------------------------------------


def test_no_engine_is_needed() -> None:
    """Paused, asleep, or dead and not to come back."""
    sampler, client = make()
    expected = sampler.encode(QUESTION)

    def check() -> None:
        assert soon(lambda: sampler.encode(QUESTION)) == expected
        assert soon(lambda: sampler.count_tokens(QUESTION)) == [len(expected[0])]
        assert soon(lambda: sampler.decode([5])) == "#"

    with sampler.pause():
        check()
    client._router._admission.asleep = True
    check()
    client._router._admission.asleep = False

    async def dead() -> None:
        raise EngineDeadError("it died")

    client._service._server._engine.check_health = dead  # type: ignore[union-attr, method-assign]
    wait_until(lambda: sampler.status()["engines"][ENGINE]["state"] != "ready", "the engine is given up")
    with pytest.raises(EngineDeadError, match="it died"):
        sampler.sample(QUESTION, ONE)
    check()
    sampler.shutdown()


def test_work_is_done_in_the_thread_for_it(sampler: RunningSampler) -> None:
    """Never on the event loop, which serves every other call: also of a short call to an idle router."""
    sampler.set_template(Threads)
    ids = sampler.encode(QUESTION)
    sampler.count_tokens(QUESTION)
    texts = sampler.decode(ids)
    names = {*Threads.names, *texts}
    assert len(Threads.names) >= 2 and all(name.startswith("encode") for name in names), names


class Threads(Template):
    """A template that notes the threads that it works in."""

    names: list[str] = []  # noqa: RUF012

    def render(self, messages: Any, tools: Any, *, generation_prompt: bool = True) -> str:
        Threads.names.append(threading.current_thread().name)
        return super().render(messages, tools, generation_prompt=generation_prompt)

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        return threading.current_thread().name


@pytest.mark.parametrize("large", ["encode", "decode"])
def test_large_call_does_not_hold_up_others(sampler: RunningSampler, large: str) -> None:
    """Ten thousand inputs; calls that come later are answered long before, those that sample among them."""
    count, encoding = 10_000, sampler._client._router._encoding  # type: ignore[attr-defined]

    async def run() -> None:
        calls: dict[str, Callable[[], Any]] = {
            "encode": lambda: sampler.encode_async(QUESTIONS[:1] * count),
            "decode": lambda: sampler.decode_async(np.full((count, 200), 5)),
        }
        many = asyncio.ensure_future(calls[large]())
        await eventually(lambda: encoding._latest is not None)  # it has begun
        for _ in range(3):
            assert (await sampler.sample_async(QUESTION, ONE)).sequences[0].tokens
            assert await sampler.decode_async([5]) == "#"
        assert not many.done()
        assert len(await many) == count

    asyncio.run(run())


def test_inputs_are_taken_when_the_call_is_made(sampler: RunningSampler) -> None:
    """Not when it is awaited: the caller may fill the array again."""
    ids = np.array([5, 6])
    encoded, counted, decoded = (
        sampler.encode_async({"input_ids": ids}),
        sampler.count_tokens_async({"input_ids": ids}),
        sampler.decode_async(ids),
    )
    ids.fill(7)

    async def run() -> list[object]:
        return [await encoded, await counted, await decoded]

    assert asyncio.run(run()) == [[[5, 6]], [2], "#$"]


def test_call_past_its_time_is_a_deadline_error(sampler: RunningSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of other control calls; there is nothing in its response."""
    with monkeypatch.context() as patch:
        patch.setattr("twinkle_serve.timing.CONTROL_TIMEOUT_S", 1e-6)
        for name, call in (
            ("encode", lambda: sampler.encode(QUESTIONS)),
            ("count_tokens", lambda: sampler.count_tokens(QUESTIONS)),
            ("decode", lambda: sampler.decode([5])),
        ):
            with pytest.raises(DeadlineError, match=f"{name} did not end within 1e-06 s") as raised:
                call()
            assert raised.value.response is None
    assert sampler.decode([5]) == "#"


def test_template_is_named_by_handle(sampler: RunningSampler) -> None:
    """A registered name; the config's without one. An unknown one is a TemplateError."""
    loop, router = sampler._client.loop, sampler._client._router  # type: ignore[attr-defined]
    ids = loop.call(router.encode(QUESTION, template="Template"))
    assert list(ids) == list(loop.call(router.encode(QUESTION))) == sampler.encode(QUESTION)
    assert loop.call(router.count_tokens(QUESTION, template="Template")) == [len(ids[0])]
    assert loop.call(router.decode(ids, template="Template")) == sampler.decode(ids)
    for call in (router.encode, router.count_tokens, router.decode):
        with pytest.raises(TemplateError, match="unknown template 'Tmplate', did you mean 'Template'"):
            loop.call(call([5], template="Tmplate"))


# -- through a service ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["encode", "count_tokens", "decode"])
def test_call_is_sent_again_when_the_router_dies(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was, with this sampler's template. Inputs travel as bytes and ids as one array: neither stops a router."""
    monkeypatch.setattr(client_module, "RETRY_PAUSES_S", (0.0,))
    monkeypatch.setattr(serve, "status", lambda: Mock(applications={"sampler": None}))
    sent: list[tuple[Any, dict[str, Any]]] = []
    answer = {"encode": TokenLists.of([np.array([5], np.int32)]), "count_tokens": [1], "decode": ["#"]}[method]

    def end(argument: Any, **options: Any) -> object:
        sent.append((argument, options))
        return ActorDiedError() if len(sent) == 1 else answer

    sampler = RunningSampler(ServiceClient(RouterHandle(end), "sampler"))
    sampler._template = "Template"
    given: list[Any] = [[5], [6, 7]] if method == "decode" else [{"input_ids": [5]}, {"input_ids": [6, 7]}]
    made = getattr(sampler, method)(given)
    assert made == (list(answer) if method == "encode" else answer)
    first, second = sent
    assert first == second and first[1].pop("template") == "Template"
    if method == "decode":
        assert isinstance(first[0], TokenLists) and list(first[0]) == given
        assert first[1] == {"skip_special_tokens": False}
    else:
        assert isinstance(first[0], PackedInputs) and as_list(first[0]) == given
        assert first[1] == {"continue_final_message": None, "add_generation_prompt": True}
