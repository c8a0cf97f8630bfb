"""Streamed samples on every engine."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import numpy as np
import pytest

from tests.support.harness import EngineHarness, Prompts


@pytest.mark.parametrize("stop", [None, "second", "never this"])
async def test_stream_is_the_sample(engine: EngineHarness, prompts: Prompts, stop: str | None) -> None:
    """All deltas joined are `decoded` of the same call, and only the last one has a reason."""
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True, "seed": 5}
    free = await engine.one(prompts[1], **options)
    if stop == "second":
        options["stop"] = [free.decoded[2:4], "never this"]
    elif stop:
        options["stop"] = stop
    whole = await engine.one(prompts[1], **options)
    deltas = await engine.stream(prompts[1], **options)
    assert "".join(delta.text for delta in deltas) == whole.decoded
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == whole.stop_reason
    assert stop == "second" or len(deltas) > 3


async def test_stream_keeps_an_end_of_sequence_that_is_a_stop_string(engine: EngineHarness, prompts: Prompts) -> None:
    """The token ends the sample, not the stop string, so its text is kept."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "stop": ["<|im_end|>"]}
    whole = await engine.one(prompts[0], **options)
    deltas = await engine.stream(prompts[0], **options)
    assert "".join(delta.text for delta in deltas) == whole.decoded
    assert engine.info.kind == "fake" or whole.decoded.endswith("<|im_end|>")


async def test_stream_never_splits_a_character(engine: EngineHarness) -> None:
    """Random bytes include invalid and multi-byte characters; the text is that of the whole sample."""
    nonsense = np.arange(150, 190)
    options: dict[str, Any] = {"temperature": 2.0, "max_tokens": 80, "ignore_eos": True, "seed": 3}
    whole = await engine.one(nonsense, **options)
    deltas = await engine.stream(nonsense, **options)
    assert "".join(delta.text for delta in deltas) == whole.decoded


async def test_stream_that_is_closed_frees_the_engine(engine: EngineHarness, prompts: Prompts) -> None:
    """Closing after the first delta ends the sample; the next call is answered."""
    session = await engine.session()
    group = engine.group(prompts[0], ignore_eos=True, temperature=0)
    async with contextlib.aclosing(engine.server.stream(session, group)) as deltas:
        async for _ in deltas:
            break
    async with asyncio.timeout(60):
        assert len((await engine.one(prompts[1], temperature=0, max_tokens=4, ignore_eos=True)).tokens) == 4
