"""A request gathers exactly what it asked for."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.support.responses import columns
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.errors import EngineError
from twinkle_serve.routing.request import PlannedPrompt, Request, ResponseHeader, plan_prompts
from twinkle_serve.routing.seeds import prompt_seed
from twinkle_serve.template.prompts import Prompt

HEADER = ResponseHeader(logprobs_mode="raw_logprobs", parser=MessageParser())


def request(prompts: int, samples: int, seed: int | None = None) -> Request:
    made = [Prompt(np.array([i, i], np.int32), index=i) for i in range(prompts)]
    params = [SamplingParams(num_samples=samples, seed=seed)] * prompts
    return Request(10, plan_prompts(made, params), HEADER)


def test_request_makes_one_group_a_prompt() -> None:
    """With the prompt's own seed, or none."""
    groups = request(3, 4, seed=5).groups()
    assert [(g.id, g.count, g.first_sample) for g in groups] == [(10, 4, 0), (11, 4, 0), (12, 4, 0)]
    assert [g.seed for g in groups] == [prompt_seed(5, i) for i in range(3)]
    assert [g.seed for g in request(2, 1).groups()] == [None, None]


async def test_request_returns_input_order_whatever_comes_first() -> None:
    """Parts of a split prompt are put together."""
    made = request(2, 3)
    made.add(columns(11, ["x", "y", "z"]))
    made.add(columns(10, ["c"], first=2))
    assert made.samples_missing == 2
    made.add(columns(10, ["a", "b"]))
    response = await made.response()
    assert [seq.decoded for seq in response.sequences] == ["a", "b", "c", "x", "y", "z"]
    assert [seq.prompt_index for seq in response.sequences] == [0, 0, 0, 1, 1, 1]


async def test_request_yields_each_prompt_as_it_is_complete() -> None:
    """Once, with all its samples, and not before."""
    made = request(3, 2)
    parts = made.prompts_as_they_finish()
    made.add(columns(12, ["e"]))
    waiting = asyncio.ensure_future(anext(parts))
    made.add(columns(11, ["c", "d"]))
    first = await waiting
    assert [(part.prompt_index, [s.decoded for s in part.sequences]) for part in first] == [(1, ["c", "d"])]
    made.add(columns(10, ["a", "b"]))
    made.add(columns(12, ["f"], first=1))
    rest = [(part.prompt_index, [s.decoded for s in part.sequences]) async for r in parts for part in r]
    assert rest == [(0, ["a", "b"]), (2, ["e", "f"])]


async def test_request_raises_what_failed_it() -> None:
    """Samples that came before do not hide it."""
    made = request(2, 1)
    made.add(columns(10, ["a"]))
    made.fail(EngineError("engine-dp0 is gone"))
    with pytest.raises(EngineError, match="engine-dp0 is gone"):
        await made.response()


def test_request_refuses_a_sample_too_many() -> None:
    """More samples than asked for would be a bug of ours."""
    made = request(1, 1)
    made.add(columns(10, ["a"]))
    with pytest.raises(AssertionError, match="more than 1"):
        made.add(columns(10, ["b"]))


async def test_response_has_the_inputs_of_its_prompts() -> None:
    """By their indices in the call, a dict for each; or none, if they are not asked for."""
    inputs = [{"id": i} for i in range(4)]
    prompts = [PlannedPrompt(Prompt(np.array([i], np.int32), index=i), SamplingParams()) for i in (1, 3)]
    for given, expected in ((inputs, [{"id": 1}, {"id": 3}]), (None, [])):
        made = Request(10, prompts, HEADER, inputs=given)
        made.add(columns(10, ["a"]))
        made.add(columns(11, ["b"]))
        response = await made.response()
        assert response.inputs == expected
        assert not any(item is own for item in response.inputs for own in inputs)
