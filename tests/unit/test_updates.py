"""Updates of running samples, from engines to the reader of a call, whatever ends in between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from tests.support.eventually import eventually
from tests.support.failing_service import PROMPTS, Service
from tests.support.responses import columns, response
from tests.support.router_handle import RouterHandle
from tests.support.updates import Joined
from twinkle_serve.channel import Channel
from twinkle_serve.data_format.call_messages import Answer, CallMessage, SentCall
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.sample_updates import (
    MAX_PARTS,
    CallBegun,
    DifferentSampleError,
    HandedOut,
    SampleUpdate,
    UpdatesItem,
    WaitingUpdates,
)
from twinkle_serve.data_format.samples import PartialSample, StopReason
from twinkle_serve.data_format.token_lists import TokenLists
from twinkle_serve.engines.group_runner import PartialUpdate
from twinkle_serve.errors import EngineDeadError, ServiceError
from twinkle_serve.routing.call_updates import CallUpdates, FollowedPrompt
from twinkle_serve.routing.caller_session import CallerSession
from twinkle_serve.sampler.client import ServiceClient
from twinkle_serve.sampler.connection import RunningCall

LONG: dict[str, Any] = {"max_tokens": 80, "ignore_eos": True, "logprobs": 1}
SEEDED = {**LONG, "seed": 3}


def partial(tokens: str) -> PartialSample:
    """One token a character."""
    ids = np.array([*map(ord, tokens)], np.int32)
    logprobs = -ids[:, None].astype(np.float32)
    return PartialSample(tokens=ids, logprobs=logprobs, logprob_tokens=None, weight_versions=(("initial", 0),))


def update(
    text: str, offset: int = 0, *, end: StopReason | None = None, prompt: int = 0, sample: int = 0
) -> SampleUpdate:
    return SampleUpdate(
        prompt_index=prompt,
        sample=sample,
        offset=offset,
        new=partial(text),
        text=text,
        text_offset=offset,
        stop_reason=end,
    )


def reported(text: str, offset: int = 0, *, sample: int = 0, count: int = 1) -> PartialUpdate:
    return PartialUpdate(
        attempt=(1, 0, 0),
        sample=sample,
        offset=offset,
        partial=partial(text),
        count=count,
        text=text,
        text_offset=offset,
    )


def call_updates(*, reproducible: bool = True) -> CallUpdates:
    return CallUpdates("decoded", {1: FollowedPrompt(0, reproducible)})


def summary(updates: Sequence[SampleUpdate]) -> list[tuple[int, int, str, StopReason | None]]:
    return [(each.sample, each.offset, each.text, each.stop_reason) for each in updates]


# -- one call's updates ------------------------------------------------------------------------------


def test_waiting_updates_of_a_sample_are_joined() -> None:
    """Nothing is dropped, and no more objects wait than samples have some of."""
    waiting = WaitingUpdates()
    text = "".join(chr(97 + i % 26) for i in range(3 * MAX_PARTS))
    for i, letter in enumerate(text):
        waiting.add(update(letter, i))
        waiting.add(update(letter, i, sample=1))
        assert all(len(parts) <= MAX_PARTS for parts in waiting._updates.values())
    first, second = waiting.take()
    assert first.text == second.text == text and first.tokens.tolist() == [*map(ord, text)]
    assert first.logprobs is not None and first.logprobs[:, 0].tolist() == [-ord(c) for c in text]
    assert first.weight_versions == (("initial", 0),) and not waiting.take()


def test_reader_is_handed_out_each_token_once() -> None:
    """Of samples that start anew, overlap, and end."""
    handed_out = HandedOut()
    parts = [update("abc"), update("ab"), update("abcd"), update("cde", 2), update("abcde", end="stop")]
    rests = [handed_out.rest(part) for part in [*parts, update("abcde", end="stop")]]
    assert summary([rest for rest in rests if rest is not None]) == [
        (0, 0, "abc", None),
        (0, 3, "d", None),
        (0, 4, "e", None),
        (0, 5, "", "stop"),
    ]


@pytest.mark.parametrize("other", [update("abx"), update("ab", end="stop"), update("abxdefg")])
def test_sample_that_is_another_one_is_noticed(other: SampleUpdate) -> None:
    """By any token, or by its end."""
    handed_out = HandedOut()
    handed_out.rest(update("abcd"))
    with pytest.raises(DifferentSampleError):
        handed_out.rest(other)


def test_last_update_of_a_sample_has_the_rest_and_its_end() -> None:
    """Whether or not any came before; a greedy group's are those of each sample."""
    updates = call_updates()
    updates.add(reported("ab", count=2))
    assert summary(updates.take()) == [(0, 0, "ab", None), (1, 0, "ab", None)]
    updates.add(reported("c", 2))
    updates.finish(columns(1, ["abcd", "abx", "z"]))
    ends: list[Any] = [(0, 2, "cd", "length"), (1, 2, "x", "stop"), (2, 0, "z", "length")]
    assert summary(updates.take()) == ends


def test_unseeded_sample_starts_anew_while_nobody_has_read_it() -> None:
    """What waits is dropped."""
    updates = call_updates(reproducible=False)
    updates.add(reported("abc"))
    updates.restart(1, [0, 1])
    updates.add(reported("xy"))
    assert summary(updates.take()) == [(0, 0, "xy", None)]
    updates.add(reported("z", 2))
    with pytest.raises(EngineDeadError, match=r"sample 0 of inputs\[0\] lost its engine after 3 of its tokens"):
        updates.restart(1, [0])


# -- engines that end ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def started(**args: Any) -> AsyncIterator[Service]:
    service = Service(**args)
    await service.start()
    for engine in service.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.002})
    try:
        yield service
        await eventually(service.idle)
        assert not len(service.router._scheduler._partials), "samples that nobody waits for are followed"
    finally:
        await service.stop()


@pytest.fixture(autouse=True)
def _quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinkle_serve.timing.PROBE_PERIOD_S", 0.05)


def busy(service: Service) -> list[str]:
    pool = service.router._scheduler
    return [name for name in service.router._engines.active if pool.sequences_of(name)]


async def interrupted(
    service: Service, params: dict[str, Any], *, samples: int = 2, change: Callable[[], None] = lambda: None
) -> Joined:
    """All items of a call over two prompts whose first busy engine ends after ten tokens of each sample."""
    joined, ended = Joined(), False
    request = SampleRequest(inputs=PROMPTS[:2], sampling_params=params, num_samples=samples)
    async with contextlib.aclosing(service.router.run_updates(request)) as items:
        async for item in items:
            joined.add(item)
            lengths = [sum(len(each.tokens) for each in parts) for parts in joined.samples.values()]
            if not ended and len(lengths) == 2 * samples and min(lengths) >= 10:
                ended = True
                change()
                service.engines[busy(service)[0]].end(EngineDeadError("killed"))
    assert ended
    return joined


@pytest.mark.parametrize("params", [SEEDED, {**LONG, "temperature": 0}, {**SEEDED, "stop": ["never in it"]}], ids=str)
async def test_reproducible_sample_goes_on_where_its_engine_ends(params: dict[str, Any]) -> None:
    """As if nothing had happened: no token comes twice, and the samples are those of the same call without updates."""
    async with started() as service:
        plain = await service.router.sample(PROMPTS[:2], params, num_samples=2)
        before = sum(service.engines[name].sampled.total() for name in service.engines)
        joined = await interrupted(service, params)
        joined.check()
        again = {(i, j): plain[i].sequences[j].tokens for i in range(2) for j in range(2)}
        assert {key: SampleUpdate.concat(parts).tokens.tolist() for key, parts in joined.samples.items()} == again
        assert sum(service.engines[name].sampled.total() for name in service.engines) > 2 * before > 0


async def test_unseeded_sample_that_cannot_be_resumed_is_an_error() -> None:
    """It says why, and what helps."""
    async with started() as service:
        with pytest.raises(EngineDeadError, match=r"it has no seed to be sampled again with\. Send the call again"):
            await interrupted(service, {**LONG, "stop": ["never"]})


@pytest.mark.parametrize("failover", ["restart", "resume"])
async def test_unseeded_sample_goes_on(failover: str) -> None:
    """From the tokens that its reader has, whatever is done with calls without updates."""
    async with started(failover=failover) as service:
        joined = await interrupted(service, LONG)
        joined.check()
        assert all(len(SampleUpdate.concat(parts).tokens) == 80 for parts in joined.samples.values())


async def test_seeded_sample_with_other_tokens_is_an_error() -> None:
    """As after new weights: its reader has the beginning of another sample."""
    async with started() as service:

        def load_other_weights() -> None:
            for engine in service.engines.values():
                engine._logits = np.roll(engine._logits, 1, axis=0)

        with pytest.raises(EngineDeadError, match="has other tokens when it is sampled again"):
            await interrupted(service, SEEDED, change=load_other_weights)


async def test_sample_without_tokens_starts_anew() -> None:
    """Without a seed as well: nobody has seen anything of it."""
    async with started() as service:
        for engine in service.engines.values():
            engine.hangs = True
        joined = Joined()
        async with contextlib.aclosing(service.router.sample_updates(PROMPTS[:1], LONG)) as items:
            joined.add(await anext(items))
            rest = asyncio.ensure_future(anext(items))

            await eventually(lambda: bool(busy(service)) and service.running() > 0)
            (name,) = busy(service)
            for engine in service.engines.values():
                engine.hangs = False
            service.engines[name].end(EngineDeadError("killed"))
            joined.add(await rest)
            async for item in items:
                joined.add(item)
        joined.check()


async def test_closing_a_call_aborts_its_samples_at_once() -> None:
    """Within a tenth of a second; the best of a few, as the machine may be busy."""
    async with started() as service:
        endless = {"max_tokens": 120, "ignore_eos": True}
        loop, best_s = asyncio.get_running_loop(), math.inf
        for _ in range(5):
            items = service.router.sample_updates(PROMPTS[:2], endless, num_samples=2)
            assert isinstance(await anext(items), CallBegun) and isinstance(await anext(items), list)
            assert service.running()
            closed_at = loop.time()
            await items.aclose()
            async with asyncio.timeout(10.0):
                for engine in service.engines.values():
                    await engine._idle.wait()
            best_s = min(best_s, loop.time() - closed_at)
        assert best_s < 0.1


async def test_groups_without_updates_are_not_asked_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary calls cost what they did."""
    async with started() as service:
        for engine in service.engines.values():
            monkeypatch.setattr(engine, "partial_output", None)
        await service.router.sample(PROMPTS[:2], LONG, num_samples=2)


async def test_slow_reader_gets_all_updates_in_few_items() -> None:
    """They are joined in the router while it does not read."""
    async with started() as service:
        items = service.router.sample_updates(PROMPTS[:1], LONG, num_samples=2)
        joined = Joined.of([await anext(items)])
        (request,) = set(service.router._requests.values())
        await eventually(lambda: request.settled)
        rest: list[UpdatesItem] = [item async for item in items]
        assert len(rest) == 2
        for item in rest:
            joined.add(item)
        joined.check()


# -- callers and routers that end ----------------------------------------------------------------------


class Connection(Channel[list[Answer], CallMessage]):
    """A connection whose other side reads when it is told to."""

    def __init__(self) -> None:
        super().__init__(lambda message: None, lambda: None)
        self.messages: list[list[Answer]] = []
        self.room = asyncio.Event()

    def send(self, message: list[Answer]) -> None:
        self.messages.append(message)

    async def drain(self) -> None:
        await self.room.wait()
        self.room.clear()


async def test_session_takes_the_next_updates_when_its_connection_has_room() -> None:
    """The others wait where they are joined."""
    asked = itertools.count()
    latest = 0

    class Router:
        async def run_updates(self, request: SampleRequest) -> AsyncIterator[UpdatesItem]:
            nonlocal latest
            for latest in asked:
                yield [update("a", latest)]

    router: Any = Router()
    session = CallerSession(router)
    session.channel = connection = Connection()
    session._take(CallMessage([SentCall.pack(0, "run_updates", SampleRequest(inputs=[]))]))
    running = asyncio.ensure_future(session.run())

    await eventually(lambda: len(connection.messages) == 1)
    for _ in range(100):  # turns of the event loop
        await asyncio.sleep(0)
    assert latest == 0
    connection.room.set()

    await eventually(lambda: len(connection.messages) == 2)
    assert latest == 1
    running.cancel()
    await asyncio.wait({running})


async def test_slow_caller_gets_updates_joined() -> None:
    """In order, before the answer that follows."""
    call = RunningCall("run_updates", SampleRequest(inputs=[]), lambda: None)
    for i, letter in enumerate("abc"):
        call.put(Answer(0, [update(letter, i)]))
    call.put(Answer(0, answer := response([columns(0, ["abc"])], [], [[1]])))
    call.put(Answer(0, [update("x", prompt=1)]))
    call.put(Answer(0, last=True))
    first, second, third = await call.next(), await call.next(), await call.next()
    assert isinstance(first, list) and isinstance(third, list)
    assert [each.text for each in first] == ["abc"] and second is answer and third[0].prompt_index == 1
    assert await call.next() is None


def begun(indices: Sequence[int], *, reproducible: bool = True, adapter: str = "") -> CallBegun:
    return CallBegun(
        prompt_indices=tuple(indices),
        prompts=TokenLists.of([np.array([i], np.int32) for i in indices]),
        num_samples=(1,) * len(indices),
        reproducible=(reproducible,) * len(indices),
        adapter=adapter,
        logprobs_mode="raw_logprobs",
        logprobs_are_masked=False,
        parser=MessageParser(),
        turns=(),
    )


def complete(prompt: int, text: str) -> Any:
    part = response([columns(0, [text])], [{}], [[prompt]])
    return replace(part, prompt_indices=(prompt,))


def items_of(*attempts: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> list[UpdatesItem]:
    """Items of a call over two prompts, each attempt at which has a router of its own."""
    monkeypatch.setattr("twinkle_serve.sampler.client.RETRY_PAUSES_S", (0.0, 0.0))
    remaining = iter(attempts)
    handle: Any = RouterHandle(lambda request: next(remaining))
    client = ServiceClient(handle, "sampler")

    async def deployed(patience_s: float) -> bool:
        return True

    monkeypatch.setattr(client, "_is_deployed", deployed)
    items = list[UpdatesItem]()

    async def collect() -> None:
        request = client.prepare(SampleRequest(inputs=[{"input_ids": [0]}, {"input_ids": [1]}], timeout_s=20.0))
        async with contextlib.aclosing(client.run_updates(request)) as updates:
            async for item in updates:
                items.append(item)

    try:
        client.loop.call(collect())
    except ServiceError as error:
        items.append(error)  # type: ignore[arg-type]
    return items


DIED = ActorDiedError()


def test_seeded_call_outlives_its_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has arrived is not yielded again."""
    first = [begun([0, 1]), [update("ab"), update("x", prompt=1, end="length")], complete(1, "x"), DIED]
    second = [begun([0]), [update("a")], [update("bcd", 1, end="length")], complete(0, "abcd")]
    items = items_of(first, second, monkeypatch=monkeypatch)
    joined = Joined.of(items)
    joined.check()
    assert SampleUpdate.concat(joined.samples[0, 0]).text == "abcd" and len(joined.responses) == 2


@pytest.mark.parametrize(
    ("second", "error"),
    [
        ([begun([0, 1]), [update("ax")]], "has other tokens when it is sampled again, after 2 of them had arrived"),
        ([begun([0, 1], adapter="lora@2")], "the call's adapter is 'lora@2' by now, after updates of ''"),
    ],
)
def test_call_that_is_another_one_at_the_next_router_is_an_error(
    second: list[Any], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its tokens or by its adapter."""
    items = items_of([begun([0, 1]), [update("ab")], DIED], second, monkeypatch=monkeypatch)
    assert isinstance(items[-1], ServiceError) and error in str(items[-1])


def test_unseeded_call_does_not_outlive_its_router_once_tokens_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that, and when those that have arrived are complete, it does."""
    first = [begun([0, 1], reproducible=False), [update("x", end="length")], complete(0, "x"), DIED]
    second = [begun([1], reproducible=False), [update("y", prompt=1)], DIED]
    items = items_of(first, second, monkeypatch=monkeypatch)
    assert len(items) == 5 and isinstance(items[-1], ServiceError) and "did not answer" in str(items[-1])
