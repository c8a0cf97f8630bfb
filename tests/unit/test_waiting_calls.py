"""Calls that wait, that are sent again, or that are cancelled: two engines in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.eventually import eventually
from tests.support.failing_service import PROMPTS, Service, exact
from twinkle_serve.errors import LeaseExpiredError, QueueFullError, RequestError
from twinkle_serve.routing.router import Router


async def test_caller_that_is_silent_loses_its_call(service: Service) -> None:
    """Its lease ends, and its samples with it; one that renews keeps it."""
    for engine in service.engines.values():
        engine.gate = asyncio.Event()
    lost, kept = (
        asyncio.ensure_future(
            service.router.sample(PROMPTS[:2], {"max_tokens": 4}, num_samples=2, request_id=request_id, lease_s=lease_s)
        )
        for request_id, lease_s in (("lost", 0.2), ("kept", 2.0))
    )

    async def given_up() -> bool:
        await service.router.renew(["kept", "unknown"], 5.0)
        return lost.done()

    await eventually(given_up)
    with pytest.raises(LeaseExpiredError, match=r"the caller of lost has been silent for 0\.2 s"):
        await lost
    for engine in service.engines.values():
        assert engine.gate is not None
        engine.gate.set()
    assert exact(await kept, 2, 2)


async def test_call_that_is_sent_again_takes_the_place_of_the_first(service: Service) -> None:
    """With the same id. Inputs that it lists as done are not sampled, and seeds are those of the whole call."""
    whole = await service.router.sample(PROMPTS[:4], {"max_tokens": 4, "seed": 9}, num_samples=2)
    for engine in service.engines.values():
        engine.gate = asyncio.Event()
    first = asyncio.ensure_future(
        service.router.sample(PROMPTS[:4], {"max_tokens": 4, "seed": 9}, num_samples=2, request_id="x")
    )

    async def running() -> bool:
        return service.running() == 4

    await eventually(running)
    second = asyncio.ensure_future(
        service.router.sample(PROMPTS[:4], {"max_tokens": 4, "seed": 9}, num_samples=2, request_id="x", done=[0, 2])
    )
    with pytest.raises(LeaseExpiredError, match="sent again"):
        await first
    for engine in service.engines.values():
        assert engine.gate is not None
        engine.gate.set()
    again = await second
    assert again.prompt_indices == (1, 3)
    for part, index in zip(again, (1, 3), strict=True):
        assert part.columns.tokens.tolist() == whole[index].columns.tokens.tolist()


@pytest.fixture
async def small() -> AsyncIterator[Service]:
    made = Service(max_queued_requests=3)
    await made.start()
    for engine in made.engines.values():
        engine.gate = asyncio.Event()
    yield made
    await made.stop()


async def test_queue_that_is_full_refuses_at_once_and_says_when_to_come_back(small: Service) -> None:
    """A typed error with the queue's length. Accepted calls are sampled, and later ones when there is room."""
    calls = [asyncio.ensure_future(small.router.sample(PROMPTS, {"max_tokens": 2}, num_samples=4)) for _ in range(3)]

    async def waiting() -> bool:
        status = await small.router.status()
        return bool(status["requests"] == 3 and status["groups_waiting"])

    await eventually(waiting)
    with pytest.raises(QueueFullError, match=r"\d+ prompts of 3 calls wait, .* max_queued_requests=3") as caught:
        await small.router.sample(PROMPTS, {"max_tokens": 2})
    assert caught.value.retry_after_s >= 1
    for engine in small.engines.values():
        assert engine.gate is not None
        engine.gate.set()
    for call in calls:
        assert exact(await call, len(PROMPTS), 4)
    assert exact(await small.router.sample(PROMPTS, {"max_tokens": 2}), len(PROMPTS), 1)


@contextlib.asynccontextmanager
async def encoding_waits(router: Router) -> AsyncIterator[None]:
    """Inside, no call's prompts are encoded."""
    end = threading.Event()
    encoding = asyncio.ensure_future(router._admission._encoding.run(False, end.wait))
    await asyncio.sleep(0)  # it has begun
    try:
        yield
    finally:
        end.set()
        await encoding


async def test_what_is_cancelled_while_its_call_is_encoded_is_not_sampled(service: Service) -> None:
    """Some of its prompts, which the response does not have, or all, which is an error."""
    async with encoding_waits(service.router):
        some = asyncio.ensure_future(service.router.sample(PROMPTS, {"max_tokens": 2}, request_id="some"))
        every = asyncio.ensure_future(service.router.sample(PROMPTS, {"max_tokens": 2}, request_id="every"))
        await asyncio.sleep(0)
        assert await service.router.cancel("some", [0, 2, 99]) == 2
        assert await service.router.cancel("some", [0]) == 0
        assert await service.router.cancel("every") == len(PROMPTS)
    assert (await some).prompt_indices == tuple(i for i in range(len(PROMPTS)) if i not in (0, 2))
    with pytest.raises(RequestError, match="every prompt of the call was cancelled"):
        await every
    await eventually(service.idle)


async def test_lease_that_lapses_while_its_call_is_encoded_ends_it(service: Service) -> None:
    """Nothing of it is sampled; a lease that is no number of seconds is refused."""

    async def lapsed() -> bool:
        live = service.router._admission._calls.get("left")
        return live is not None and live.error is not None

    async with encoding_waits(service.router):
        call = asyncio.ensure_future(service.router.sample(PROMPTS, request_id="left", lease_s=0.01))
        await eventually(lapsed)
    with pytest.raises(LeaseExpiredError, match="the caller of left has been silent"):
        await call
    await eventually(service.idle)
    with pytest.raises(RequestError, match="lease_s must be a number of seconds"):
        await service.router.sample(PROMPTS, request_id="left", lease_s=-1)


async def test_calls_that_are_encoded_are_bounded_too(small: Service) -> None:
    """They are in no queue, and would be taken without end."""
    async with encoding_waits(small.router):
        calls = [asyncio.ensure_future(small.router.sample(PROMPTS[:1], {"max_tokens": 2})) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="max_queued_requests=3"):
            await small.router.sample(PROMPTS[:1], {"max_tokens": 2})
        with pytest.raises(QueueFullError):
            await anext(small.router.sample_stream(PROMPTS[:1], {"max_tokens": 2}))
    for engine in small.engines.values():
        assert engine.gate is not None
        engine.gate.set()
    for call in calls:
        assert exact(await call, 1, 1)


async def test_stream_ends_when_its_lease_does_or_it_is_cancelled(service: Service) -> None:
    """With an error; its engine is free then."""
    options: dict[str, Any] = {"max_tokens": 100, "ignore_eos": True}
    for engine in service.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.01})
    leased = service.router.sample_stream(PROMPTS[:1], options, request_id="leased", lease_s=0.1)
    with pytest.raises(LeaseExpiredError, match="the caller of leased has been silent"):
        [delta async for delta in leased]
    cancelled = service.router.sample_stream(PROMPTS[:1], options, request_id="cancelled")
    assert await anext(cancelled)
    assert await service.router.cancel("cancelled") == 1
    with pytest.raises(RequestError, match="the stream was cancelled"):
        [delta async for delta in cancelled]
    await eventually(service.idle)


async def test_stream_without_new_text_ends_at_once_too(small: Service) -> None:
    """A cancelled stream, or one without its caller, does not wait for an engine that produces nothing."""
    for engine in small.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 60.0})

    async def sampling() -> bool:
        return any(engine["sequences"] for engine in (await small.router.status())["engines"].values())

    async with asyncio.timeout(60):
        leased = small.router.sample_stream(PROMPTS[:1], {"max_tokens": 2}, request_id="leased", lease_s=0.1)
        with pytest.raises(LeaseExpiredError, match="the caller of leased has been silent"):
            await anext(leased)
        cancelled = small.router.sample_stream(PROMPTS[:1], {"max_tokens": 2}, request_id="cancelled")
        reader = asyncio.ensure_future(anext(cancelled))
        await eventually(sampling)
        assert await small.router.cancel("cancelled") == 1
        with pytest.raises(RequestError, match="the stream was cancelled"):
            await reader
