"""Iterators of a sampler in this process, on the fake engine: their ends."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from unittest.mock import Mock

import pytest

from tests.support.eventually import wait_until
from tests.support.local_sampler import ENDLESS, QUESTION, make, soon
from twinkle_serve.errors import (
    DeadlineError,
    EngineDeadError,
    TwinkleServeError,
)
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.loop_thread import ITEMS_AHEAD


def test_iterator_ends_as_often_as_it_is_asked(sampler: RunningSampler) -> None:
    """Exhausted or failed, `next` ends at once."""
    stream = sampler.sample_stream(QUESTION, {"max_tokens": 3})
    list(stream)
    assert soon(lambda: next(stream, "end")) == "end"
    failed = sampler.sample_iter([], {})
    with pytest.raises(TwinkleServeError):
        next(failed)
    assert soon(lambda: next(failed, "end")) == "end"


def test_slow_reader_gets_what_was_done_and_then_the_deadline(sampler: RunningSampler) -> None:
    """Nothing is passed over: all that was finished in time, then a DeadlineError. Never an early end."""
    prompts = [QUESTION] * (3 * ITEMS_AHEAD)
    parts = sampler.sample_iter(prompts, {"max_tokens": 2}, timeout_s=3.0)
    read = [next(parts)]
    time.sleep(3.2)  # past the deadline
    read.extend(parts)
    assert sorted(part.prompt_index for part in read) == list(range(len(prompts))), "all were done in time"
    slow, _ = make(token_latency_s=0.01)
    parts = slow.sample_iter([QUESTION] * 3, {"max_tokens": 500, "ignore_eos": True}, timeout_s=1.0)
    with pytest.raises(DeadlineError, match=r"timeout_s=1 passed when 0 of 3 samples were done"):
        list(parts)
    slow.shutdown()


def test_async_iterator_after_shutdown_raises() -> None:
    """EngineDeadError from the next item; closing it is no error."""
    sampler, _ = make(token_latency_s=0.02)

    async def read() -> None:
        stream: Any = sampler.sample_stream_async(QUESTION, ENDLESS)
        await anext(stream)
        await asyncio.to_thread(sampler.shutdown)
        with pytest.raises(EngineDeadError, match="was shut down"):
            await anext(stream)
        await stream.aclose()

    asyncio.run(read())


@pytest.mark.parametrize("method", ["sample_stream_async", "sample_iter_async"])
def test_closed_async_iterator_has_ended_its_call(method: str) -> None:
    """When `aclose` returns, nothing of the call runs any more, even where the event loop is blocked next."""
    sampler, _ = make(token_latency_s=0.02)

    async def read() -> None:
        if method == "sample_stream_async":
            items: Any = sampler.sample_stream_async(QUESTION, ENDLESS)
        else:
            items = sampler.sample_iter_async([{"input_ids": [i]} for i in range(5, 37)], {"max_tokens": 900})
        await anext(items)
        assert sampler.status()["requests"] == 1
        await items.aclose()
        assert sampler.status()["requests"] == 0

    asyncio.run(read())
    sampler.shutdown()


def test_interrupted_iterator_cancels_its_call() -> None:
    """Ctrl-C in `next`, though the traceback that a shell keeps refers to the iterator."""
    sampler, _ = make(token_latency_s=0.02)
    responses = sampler.sample_iter(QUESTION, ENDLESS)
    wait_until(lambda: sampler.status()["requests"] == 1, "it runs")
    responses._parts._arrived = Mock(get=Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(responses)
    wait_until(lambda: sampler.status()["requests"] == 0, "it is cancelled")
    sampler.shutdown()
