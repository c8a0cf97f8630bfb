"""What becomes of requests when engines end, hang, or when callers lose interest: two engines in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.support.eventually import eventually
from tests.support.failing_service import POISON, PROMPTS, Service, exact
from twinkle_serve.data_format.groups import Group, Session
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import (
    EngineDeadError,
    LeaseExpiredError,
    PoisonPromptError,
    QueueFullError,
    RequestError,
)
from twinkle_serve.routing.router import Router


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr("twinkle_serve.timing.PROBE_PERIOD_S", 0.05)
    made = Service(stall_timeout_s=0.3)
    await made.start()
    yield made
    await eventually(made.idle)
    await made.stop()


async def test_samples_that_had_arrived_are_kept_when_their_engine_ends(service: Service) -> None:
    """Only the rest of their group is sampled again, with its seeds."""
    reference = await service.router.sample(PROMPTS[:1], {"max_tokens": 4, "seed": 3}, num_samples=4)
    for engine in service.engines.values():
        engine.gate = asyncio.Event()
        engine.sampled.clear()
    parts = Router.sample_iter(service.router, PROMPTS[:1], {"max_tokens": 4, "seed": 3}, num_samples=4)
    call = asyncio.ensure_future(anext(parts))

    async def one_has_arrived() -> bool:
        return any(request.samples_missing == 3 for request in service.router._requests.values())

    await eventually(one_has_arrived)
    for engine in service.engines.values():
        engine.end(EngineDeadError("killed"))
        engine.gate.set() if engine.gate else None
    response = await call
    assert response.columns.tokens.tolist() == reference.columns.tokens.tolist()
    begun = sum((engine.sampled for engine in service.engines.values()), Counter())
    assert begun[24, 0] == 1, "what was there is not sampled again"
    assert [seq.seed for seq in response.sequences] == [seq.seed for seq in reference.sequences]


async def test_poison_prompt_fails_alone_and_is_named(service: Service) -> None:
    """It ends two engines; those beside it, on both, are sampled to their end."""
    poison = {"input_ids": [POISON, 20, 21]}
    bystanders = [
        asyncio.ensure_future(service.router.sample(PROMPTS, {"max_tokens": 8}, num_samples=4)) for _ in range(3)
    ]
    with pytest.raises(PoisonPromptError, match=r"inputs\[1\] \(3 tokens: 65, 20, 21\) was on [ab], [ab] when"):
        await service.router.sample([PROMPTS[0], poison], {"max_tokens": 4})
    for bystander in bystanders:
        assert exact(await bystander, len(PROMPTS), 4)
    assert service.restarts == 2
    assert exact(await service.router.sample(PROMPTS, {"max_tokens": 2}), len(PROMPTS), 1)


async def test_prompt_that_takes_longer_to_end_its_second_engine_is_found_all_the_same(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was cleared by then, and another suspect is beside it: that one is not taken for it."""
    monkeypatch.setattr("twinkle_serve.routing.poison.CLEARED_AFTER_S", 0.02)
    for engine in service.engines.values():
        engine.fuses = [0.1, 0.4, 0.4, 0.4]
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.01})
    fuses = service.engines["a"].fuses
    service.engines["b"].fuses = fuses  # of the prompt, wherever it is
    bystander = asyncio.ensure_future(
        service.router.sample(PROMPTS[:6], {"max_tokens": 60, "ignore_eos": True}, num_samples=2)
    )
    with pytest.raises(PoisonPromptError, match=r"inputs\[0\]"):
        await service.router.sample({"input_ids": [POISON, 20, 21]}, {"max_tokens": 90, "ignore_eos": True})
    assert exact(await bystander, 6, 2)


async def test_slow_reader_of_a_stream_does_not_make_its_engine_look_hung(service: Service) -> None:
    """It has finished long since."""
    deltas = service.router.sample_stream(PROMPTS[0], {"max_tokens": 40, "ignore_eos": True})
    assert await anext(deltas)
    await asyncio.sleep(1.0)  # three times stall_timeout_s
    assert [reason async for _, reason in deltas][-1] == "length"
    assert not service.restarts


async def test_engines_that_are_killed_again_and_again_lose_no_call(service: Service) -> None:
    """However often a group meets it: it was no fault of its own."""
    for engine in service.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.002})
    calls = [asyncio.ensure_future(service.router.sample(PROMPTS, {"max_tokens": 30}, num_samples=2)) for _ in range(2)]
    for number in range(8):
        engine = list(service.engines.values())[number % 2]
        before = service.restarts
        engine.end(EngineDeadError("killed"))

        async def is_back(before: int = before) -> bool:
            return service.restarts > before

        await eventually(is_back)
    for call in calls:
        assert exact(await call, len(PROMPTS), 2)


async def test_engine_that_hangs_is_given_up_and_replaced(service: Service) -> None:
    """It answers, but samples nothing for stall_timeout_s; its samples go elsewhere."""
    service.engines["a"].hangs = True
    assert exact(await service.router.sample(PROMPTS, {"max_tokens": 4}, num_samples=2), len(PROMPTS), 2)

    async def replaced() -> bool:
        return service.restarts == 1

    await eventually(replaced)


async def test_idle_and_paused_engines_are_not_taken_for_hung(service: Service) -> None:
    """Three times stall_timeout_s with nothing to sample, and with something that may not be sampled."""
    lease = await service.router.pause("keep", 30.0)
    call = asyncio.ensure_future(service.router.sample(PROMPTS, {"max_tokens": 4}))
    done, _ = await asyncio.wait({call}, timeout=0.9)
    assert not done and not service.restarts
    await service.router.resume(lease)
    assert exact(await call, len(PROMPTS), 1)


async def test_min_groups_cuts_off_the_tail(service: Service) -> None:
    """The response has what was complete first; the rest leaves queue and engines."""
    for engine in service.engines.values():
        engine.gate = asyncio.Event()
    many = [{"input_ids": [30, 20]}] * 3
    # Prompts with one sample finish; those with gated samples cannot.
    slow = asyncio.ensure_future(service.router.sample(many, {"max_tokens": 4}, num_samples=2, request_id="slow"))
    response = await service.router.sample(PROMPTS, {"max_tokens": 4}, min_groups=5)
    assert 5 <= len(response) <= len(PROMPTS)
    assert sorted(response.prompt_indices) == list(response.prompt_indices)
    assert len(response.sequences) == len(response)
    assert not slow.done()
    assert await service.router.cancel("slow") == 3
    with pytest.raises(RequestError, match="every prompt of the call was cancelled"):
        await slow


async def test_cancel_of_a_group_leaves_the_others(service: Service) -> None:
    """Its engine is free of it; the call ends with what is left."""
    for engine in service.engines.values():
        engine.gate = asyncio.Event()
    call = asyncio.ensure_future(service.router.sample(PROMPTS[:3], {"max_tokens": 4}, num_samples=2, request_id="one"))

    async def running() -> bool:
        return service.running() == 3

    await eventually(running)
    assert await service.router.cancel("one", [1, 7]) == 1
    assert await service.router.cancel("one", [1]) == 0, "it is gone already"

    async def freed() -> bool:
        return service.running() == 2

    await eventually(freed)
    for engine in service.engines.values():
        assert engine.gate is not None
        engine.gate.set()
    response = await call
    assert response.prompt_indices == (0, 2)
    assert [seq.prompt_index for seq in response.sequences] == [0, 0, 2, 2]
    assert await service.router.cancel("one") == 0


async def test_min_groups_that_cannot_be_is_refused(service: Service) -> None:
    """With both numbers."""
    with pytest.raises(RequestError, match="min_groups must be a number from 1 to the call's 2 prompts, got 3"):
        await service.router.sample(PROMPTS[:2], min_groups=3)
    with pytest.raises(RequestError, match="sample_timeout_s must be a number of seconds above 0, got -1"):
        await service.router.sample(PROMPTS[:2], sample_timeout_s=-1)


async def test_sample_that_runs_for_too_long_ends_where_it_is(service: Service) -> None:
    """With what it has."""
    for engine in service.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.01})
    response = await service.router.sample(
        PROMPTS[:2], {"max_tokens": 100, "ignore_eos": True}, num_samples=2, sample_timeout_s=0.2
    )
    assert exact(response, 2, 2)
    for seq in response.sequences:
        assert seq.stop_reason == "abort" and 0 < len(seq.tokens) < 100
        assert len(seq.logprobs or []) == len(seq.tokens)


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
    """Under the same id; what it has already is not sampled, and the seeds are those of the whole call."""
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


async def test_engine_is_sent_nothing_of_the_routers_bookkeeping(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are of the type that both share, whatever the router keeps of them."""
    submit, sent = EngineServer.submit, list[Group]()

    async def recorded(self: EngineServer, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        sent.extend(groups)
        await submit(self, session, groups, more)

    monkeypatch.setattr(EngineServer, "submit", recorded)
    assert exact(await service.router.sample(PROMPTS[:2], {"max_tokens": 2, "seed": 4}, num_samples=2), 2, 2)
    assert {type(group) for group in sent} == {Group}
    assert {type(group.params) for group in sent} == {DecodingParams}


async def test_engine_aborts_what_no_living_router_claims(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that is gone asks after its engines no more."""
    monkeypatch.setattr("twinkle_serve.timing.ROUTER_LEASE_S", 0.2)
    server, engine = service.servers["a"], service.engines["a"]
    engine.gate = asyncio.Event()
    incarnation = (await server.describe("gone")).incarnation
    group = Group(id=7, prompt_ids=np.array([30, 20], np.int32), params=service_params(), count=3)
    session = Session(incarnation=incarnation, router="gone")
    await server.submit(session, [group])
    items = [item async for item in server.results(session)]
    assert sum(0 if item.columns is None else len(item.columns) for item in items) == 1, "the one that was not gated"
    assert not service.running()


def service_params() -> DecodingParams:
    return DecodingParams(max_tokens=4)


@pytest.fixture
async def small() -> AsyncIterator[Service]:
    made = Service(max_queued_requests=3)
    await made.start()
    for engine in made.engines.values():
        engine.gate = asyncio.Event()
    yield made
    await made.stop()


async def test_queue_that_is_full_refuses_at_once_and_says_when_to_come_back(small: Service) -> None:
    """A typed error with the queue's length; what was taken is sampled, and the next call is once there is room."""
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


@contextlib.contextmanager
def encoding_waits(router: Router) -> Iterator[None]:
    """Inside, no call's prompts are encoded."""
    end = threading.Event()
    router._admission._encoding.submit(end.wait)
    try:
        yield
    finally:
        end.set()


async def test_what_is_cancelled_while_its_call_is_encoded_is_not_sampled(service: Service) -> None:
    """Some of its prompts, which the response does not have, or all, which is an error."""
    with encoding_waits(service.router):
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

    with encoding_waits(service.router):
        call = asyncio.ensure_future(service.router.sample(PROMPTS, request_id="left", lease_s=0.01))
        await eventually(lapsed)
    with pytest.raises(LeaseExpiredError, match="the caller of left has been silent"):
        await call
    await eventually(service.idle)
    with pytest.raises(RequestError, match="lease_s must be a number of seconds"):
        await service.router.sample(PROMPTS, request_id="left", lease_s=-1)


async def test_calls_that_are_encoded_are_bounded_too(small: Service) -> None:
    """They are in no queue, and would be taken without end."""
    with encoding_waits(small.router):
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

    async with asyncio.timeout(5):
        leased = small.router.sample_stream(PROMPTS[:1], {"max_tokens": 2}, request_id="leased", lease_s=0.1)
        with pytest.raises(LeaseExpiredError, match="the caller of leased has been silent"):
            await anext(leased)
        cancelled = small.router.sample_stream(PROMPTS[:1], {"max_tokens": 2}, request_id="cancelled")
        reader = asyncio.ensure_future(anext(cancelled))
        await eventually(sampling)
        assert await small.router.cancel("cancelled") == 1
        with pytest.raises(RequestError, match="the stream was cancelled"):
            await reader
