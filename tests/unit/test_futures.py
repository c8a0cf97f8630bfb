"""Calls without a waiting caller: joined by id, kept within bounds, ended by their session's lease."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import responses
from tests.support.eventually import eventually
from twinkle_serve import timing
from twinkle_serve.config import FutureArgs
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.futures import Submission
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import EngineDeadError, LeaseExpiredError, PromptError, QueueFullError, TwinkleServeError
from twinkle_serve.routing.futures import Futures, response_bytes


def response(tokens: int) -> SampleResponse:
    """One sample of so many tokens."""
    return responses.response([responses.columns(0, ["x" * tokens])], [], [[1]])


class Calls:
    """Calls that end when a test says so."""

    def __init__(self, refusal: TwinkleServeError | None = None) -> None:
        self.refusal = refusal
        self.begun: Counter[str] = Counter()
        self.cancelled: set[str] = set()
        self.ends: dict[str, asyncio.Future[SampleResponse]] = {}

    async def run(self, request: SampleRequest, on_admission: Callable[[], None]) -> SampleResponse:
        name = request.request_id
        self.begun[name] += 1
        if self.refusal is not None:
            raise self.refusal
        self.ends[name] = asyncio.get_running_loop().create_future()
        on_admission()
        try:
            return await self.ends[name]
        except asyncio.CancelledError:
            self.cancelled.add(name)
            raise


def call(name: str, session: str = "session", group: str = "group") -> Submission:
    request = SampleRequest(inputs=[], request_id=name)
    return Submission(id=name, session=session, group=group, request=request, note=name.encode())


def futures(calls: Calls, **args: Any) -> Futures:
    return Futures(FutureArgs(**args), calls.run)


async def states(made: Futures, *ids: str) -> list[str]:
    return [result.state for result in await made.collect(ids, 0)]


async def test_the_same_call_runs_once() -> None:
    """While it runs, and while its result is kept; each collects the one result, any number of times."""
    calls = Calls()
    made = futures(calls)
    await made.submit(call("a"))
    await made.submit(call("a"))
    waiting = [asyncio.ensure_future(made.collect(["a"], 30)) for _ in range(2)]
    assert await states(made, "a") == ["pending"]
    calls.ends["a"].set_result(result := response(3))
    for each in waiting:
        (collected,) = await each
        assert collected.response is result and collected.note == b"a"
    await made.submit(call("a"))
    assert await states(made, "a") == ["done"]
    assert calls.begun == {"a": 1}


async def test_a_full_queue_refuses_the_call_at_once_and_takes_it_later() -> None:
    """Nothing is left of a call that was refused, and no end of it is reported."""
    calls = Calls(QueueFullError("full", 3.0))
    made = futures(calls)
    with pytest.raises(QueueFullError) as raised:
        await made.submit(call("a"))
    assert raised.value.retry_after_s == 3.0
    assert await states(made, "a") == ["unknown"]
    assert not (await made.completions("group", 0, 0)).completions
    calls.refusal = None
    await made.submit(call("a"))
    assert await states(made, "a") == ["pending"]


async def test_the_errors_of_a_call_are_its_result() -> None:
    """Whether it fails as it is admitted, later, or before it is submitted."""
    calls = Calls(PromptError("empty"))
    made = futures(calls)
    await made.submit(call("a"))
    calls.refusal = None
    await made.submit(call("b"))
    calls.ends["b"].set_exception(EngineDeadError("dead"))
    refused = call("c")
    await made.submit(Submission(id="c", session="session", group="group", request=PromptError("an image")))
    await made.collect(["b"], 30)
    assert refused.id not in calls.begun
    results = await made.collect(["a", "b", "c"], 0)
    assert [str(result.error) for result in results] == ["empty", "dead", "an image"]


async def test_collecting_waits_for_the_first_of_several_calls() -> None:
    """Or until the time is up; an unknown one is told at once."""
    calls = Calls()
    made = futures(calls)
    for name in "ab":
        await made.submit(call(name))
    assert [result.state for result in await made.collect(["a", "b"], 0.01)] == ["pending", "pending"]
    assert [result.state for result in await made.collect(["a", "c"], 30)] == ["pending", "unknown"]
    waiting = asyncio.ensure_future(made.collect(["a", "b"], 30))
    await asyncio.sleep(0)
    calls.ends["b"].set_result(response(1))
    assert [result.state for result in await waiting] == ["pending", "done"]


async def test_a_forgotten_call_is_cancelled() -> None:
    """Whoever waits for it learns of that."""
    calls = Calls()
    made = futures(calls)
    await made.submit(call("a"))
    waiting = asyncio.ensure_future(made.collect(["a"], 30))
    await asyncio.sleep(0)
    made.forget(["a", "unknown"])
    assert [result.state for result in await waiting] == ["unknown"]
    await eventually(lambda: calls.cancelled == {"a"})


async def test_a_result_is_kept_for_a_while() -> None:
    """Then it is unknown, and the call runs again if it is sent again."""
    calls = Calls()
    made = futures(calls, keep_s=0.02)
    await made.submit(call("a"))
    calls.ends["a"].set_result(response(1))
    await made.collect(["a"], 30)

    async def gone() -> bool:
        return await states(made, "a") == ["unknown"]

    await eventually(gone)
    await made.submit(call("a"))
    assert calls.begun == {"a": 2}


async def test_results_are_bounded_in_bytes() -> None:
    """Those that were collected go first; while the others fill the space, calls are refused."""
    calls = Calls()
    size = response_bytes(response(100))
    made = futures(calls, max_bytes=3 * size)
    for name in "abcd":
        await made.submit(call(name))
    for name in "abc":
        calls.ends[name].set_result(response(100))
        await eventually(lambda name=name: made._by_id[name].ended)  # type: ignore[misc]
    with pytest.raises(QueueFullError, match=rf"results of {3 * size} bytes wait.* futures.max_bytes is {3 * size}"):
        await made.submit(call("e"))
    await made.submit(call("a"))  # joins
    await made.collect(["b"], 0)
    calls.ends["d"].set_result(response(100))
    await made.collect(["d"], 30)
    assert await states(made, *"abcd") == ["done", "unknown", "done", "done"]
    await made.submit(call("e"))


async def test_calls_end_with_the_lease_of_their_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats and collecting extend it; those of other sessions go on, and results stay."""
    monkeypatch.setattr(timing, "FUTURES_LEASE_S", 0.2)
    calls = Calls()
    made = futures(calls)
    for name, session in (("a", "silent"), ("b", "silent"), ("c", "beating"), ("d", "collecting")):
        await made.submit(call(name, session))
    calls.ends["b"].set_result(response(1))

    async def silent_one_has_ended() -> bool:
        assert made.renew_futures("beating")
        await made.collect(["d"], 0)
        return calls.cancelled == {"a"}

    await eventually(silent_one_has_ended)
    assert await states(made, *"abcd") == ["unknown", "done", "pending", "pending"]
    ends = (await made.completions("group", 0, 0)).completions
    assert [(end.id, end.failed) for end in ends] == [("b", False), ("a", True)], "for a client that comes back"


async def test_an_ended_session_takes_no_more_calls() -> None:
    """Its calls are cancelled, its results dropped, and its heartbeats told so."""
    calls = Calls()
    made = futures(calls)
    for name in "ab":
        await made.submit(call(name))
    await made.submit(call("c", "other"))
    calls.ends["a"].set_result(response(1))
    await made.collect(["a"], 30)
    made.end_futures("session")
    assert await states(made, *"abc") == ["unknown", "unknown", "pending"]
    assert not made.renew_futures("session") and made.renew_futures("other")
    with pytest.raises(LeaseExpiredError, match="session 'session' was ended"):
        await made.submit(call("d"))
    made.end_futures("session")


async def test_ends_are_reported_by_group_in_order() -> None:
    """Each until it is confirmed by a later position, also to a second poll with the earlier one."""
    calls = Calls()
    made = futures(calls)
    await made.submit(call("a"))
    await made.submit(call("b"))
    await made.submit(call("c", group="other"))
    waiting = asyncio.ensure_future(made.completions("group", 0, 30))
    await asyncio.sleep(0)
    calls.ends["c"].set_result(response(1))
    calls.ends["b"].set_exception(EngineDeadError("dead"))
    first = await waiting
    assert [(end.id, end.failed) for end in first.completions] == [("b", True)]
    assert await made.completions("group", 0, 0) == first
    calls.ends["a"].set_result(result := response(7))
    second = await made.completions("group", first.cursor, 30)
    assert [(end.id, end.failed, end.size_bytes) for end in second.completions] == [
        ("a", False, response_bytes(result))
    ]
    third = await made.completions("group", second.cursor, 0)
    assert not third.completions and third.cursor == second.cursor


async def test_a_new_router_reports_the_calls_of_the_one_before() -> None:
    """As failed, to a client whose cursor is of the other one; not those that were sent again."""
    calls = Calls()
    old, new = futures(calls), futures(calls)
    taken_by = await old.submit(call("a"))
    await old.submit(call("b"))
    calls.ends["b"].set_result(response(1))
    cursor = (await old.completions("group", 0, 30)).cursor
    await new.submit(call("c"))
    new.report_lost(taken_by, "group", ["a", "c"])
    new.report_lost(new.incarnation, "group", ["d"])
    ends = await new.completions("group", cursor, 0)
    assert [(end.id, end.failed) for end in ends.completions] == [("a", True)]
