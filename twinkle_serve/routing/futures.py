"""Calls without a waiting caller: they run in the router, which keeps their results for a while. Free of Ray."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cachetools import LRUCache

from twinkle_serve import tasks, timing
from twinkle_serve.config import FutureArgs
from twinkle_serve.data_format.futures import Completion, Completions, FutureResult, Submission
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import LeaseExpiredError, QueueFullError, ServiceError, TwinkleServeError, one_line
from twinkle_serve.lease import Lease
from twinkle_serve.tasks import BackgroundTasks

logger = logging.getLogger(__name__)

Run = Callable[[SampleRequest, Callable[[], None]], Awaitable[SampleResponse]]
"""Runs a call; calls the function once the call is admitted."""

MAX_WAIT_S = 30.0
"""Longest time that `collect` and `completions` wait."""

ADMISSION_WAIT_S = 2.0
"""How long `submit` waits for a call's admission, which takes longer while no engine is ready."""

MAX_ENDED_SESSIONS = 10_000
"""Ids of ended sessions that are remembered."""


@dataclass(slots=True, eq=False)
class _Future:
    id: str
    session: _Session
    group: str
    note: bytes
    task: asyncio.Task[None] | None = None
    """While the call runs."""
    response: SampleResponse | None = None
    error: TwinkleServeError | None = None
    size_bytes: int = 0
    accepted: bool = False
    """Whether a submission has returned: the caller waits for the call's end."""
    collected: bool = False
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the call is admitted, or has ended before."""
    waiters: set[asyncio.Event] = field(default_factory=set)
    """Set when the call ends."""
    expiry: asyncio.TimerHandle | None = None
    """Ends the time for which the result is kept."""

    @property
    def ended(self) -> bool:
        return self.response is not None or self.error is not None

    def result(self) -> FutureResult:
        if self.response is not None:
            return FutureResult(self.id, "done", response=self.response, note=self.note)
        if self.error is not None:
            return FutureResult(self.id, "failed", error=self.error)
        return FutureResult(self.id, "pending")


@dataclass(slots=True, eq=False)
class _Session:
    lease: Lease
    futures: dict[str, _Future] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Group:
    ends: dict[int, Completion] = field(default_factory=dict)
    """By position, ascending."""
    waiters: set[asyncio.Event] = field(default_factory=set)


class Futures:
    """Runs submitted calls and keeps their results.

    Guarantees:
        - A call that is submitted again, while it runs or its result is kept, is not run again.
        - A result is kept for `keep_s`, and can be collected any number of times. If results exceed `max_bytes`, the
          oldest of those that were collected go first, then the oldest; while results that nobody has collected exceed
          it, calls are refused.
        - Running calls end with the lease of their session, which submitting, collecting and `renew` extend.
        - `completions` reports each end of a group's calls, in order, until it is asked from a later position.
    Does not guarantee:
        - That a future survives this process: it is unknown to the next router.
    """

    def __init__(self, args: FutureArgs, run: Run) -> None:
        self._args, self._run = args, run
        self._tasks = BackgroundTasks()
        self._by_id: dict[str, _Future] = {}
        self._sessions: dict[str, _Session] = {}
        self._groups: dict[str, _Group] = {}
        self._ended_sessions: LRUCache[str, None] = LRUCache(MAX_ENDED_SESSIONS)
        self._kept: dict[str, _Future] = {}
        """Futures that have ended, the oldest first."""
        self._kept_bytes = self._uncollected_bytes = 0
        # Positions begin at the incarnation, a random number: those of another router are recognised.
        self.incarnation = self._position = secrets.randbits(31) << 20

    # -- calls -------------------------------------------------------------------------------------

    async def submit(self, submission: Submission) -> int:
        """Starts a call, or joins the one with its id. Returns when it is admitted, has failed, or waits for engines.

        Returns:
            The incarnation of this process.

        Raises:
            QueueFullError: the queue is full, or too many results wait to be collected.
            LeaseExpiredError: the session was ended.
        """
        if submission.session in self._ended_sessions:
            raise LeaseExpiredError(f"session {submission.session!r} was ended. Make a new one.")
        self._renew(submission.session)
        future = self._by_id.get(submission.id)
        if future is None:
            future = self._start_call(submission)
        try:
            async with asyncio.timeout(ADMISSION_WAIT_S):
                await future.admitted.wait()
        except TimeoutError:
            pass
        if isinstance(future.error, QueueFullError):
            self._forget(future)
            raise future.error
        future.accepted = True
        return self.incarnation

    def _start_call(self, submission: Submission) -> _Future:
        self._require_space()
        session = self._sessions[submission.session]
        future = _Future(submission.id, session, submission.group, submission.note)
        self._by_id[future.id] = session.futures[future.id] = future
        request = submission.request
        if isinstance(request, TwinkleServeError):
            self._end(future, error=request)
        else:
            future.task = self._tasks.spawn(self._run_call(future, request))
        return future

    def _require_space(self) -> None:
        most = self._args.max_bytes
        if self._uncollected_bytes >= most:
            raise QueueFullError(
                f"results of {self._uncollected_bytes} bytes wait to be collected; futures.max_bytes is {most}. "
                "Collect some, then send the call again.",
                timing.FUTURES_RETRY_S,
            )

    async def _run_call(self, future: _Future, request: SampleRequest) -> None:
        try:
            response = await self._run(request, future.admitted.set)
        except TwinkleServeError as error:
            logger.warning(f"submitted call failed: {one_line(error)}")
            self._end(future, error=error.with_traceback(None))  # its frames hold the request
        except asyncio.CancelledError:
            if tasks.is_cancelled():
                raise
            self._end(future, error=ServiceError("the call was cancelled in the router. Send it again."))
        except Exception as bug:
            logger.exception("a submitted call failed by a bug in the router")
            self._end(future, error=ServiceError(f"a bug in the router: {type(bug).__name__}: {bug}"))
        else:
            self._end(future, response=response)

    def _end(
        self, future: _Future, *, response: SampleResponse | None = None, error: TwinkleServeError | None = None
    ) -> None:
        """Records the end of a call."""
        future.task = None
        future.response, future.error = response, error
        if isinstance(error, QueueFullError) and not future.accepted:
            self._forget(future)  # its submission raises the error
            return
        future.size_bytes = 0 if response is None else response_bytes(response)
        self._kept[future.id] = future
        self._kept_bytes += future.size_bytes
        self._uncollected_bytes += future.size_bytes
        future.expiry = asyncio.get_running_loop().call_later(self._args.keep_s, self._forget, future)
        self._report(future.group, Completion(future.id, error is not None, future.size_bytes))
        future.admitted.set()
        for waiter in future.waiters:
            waiter.set()
        self._evict(future)

    def _evict(self, newest: _Future) -> None:
        """Forgets results, except the newest, until the rest fits."""
        if self._kept_bytes <= self._args.max_bytes:
            return
        for future in sorted(self._kept.values(), key=lambda kept: not kept.collected):
            if self._kept_bytes <= self._args.max_bytes:
                return
            if future is not newest:
                self._forget(future)

    def _forget(self, future: _Future) -> None:
        """Cancels a call that runs; drops its result. Idempotent."""
        if self._by_id.get(future.id) is not future:
            return
        del self._by_id[future.id], future.session.futures[future.id]
        if future.task is not None:
            future.task.cancel()
        if future.expiry is not None:
            future.expiry.cancel()
        if self._kept.pop(future.id, None) is not None:
            self._kept_bytes -= future.size_bytes
            self._uncollected_bytes -= 0 if future.collected else future.size_bytes
        future.admitted.set()
        for waiter in future.waiters:
            waiter.set()

    def forget(self, ids: Iterable[str]) -> None:
        """See `RouterAPI.forget`."""
        for future_id in ids:
            if (future := self._by_id.get(future_id)) is not None:
                self._forget(future)

    # -- results -----------------------------------------------------------------------------------

    async def collect(self, ids: Sequence[str], wait_s: float) -> list[FutureResult]:
        """See `RouterAPI.collect`."""
        futures = [future for future_id in ids if (future := self._by_id.get(future_id)) is not None]
        for session in {future.session for future in futures}:
            session.lease.renew(timing.FUTURES_LEASE_S)
        if futures and not any(future.ended for future in futures) and len(futures) == len(ids):
            await self._wait([future.waiters for future in futures], wait_s)
        results = []
        for future_id in ids:
            future = self._by_id.get(future_id)
            if future is not None and future.response is not None and not future.collected:
                future.collected = True
                self._uncollected_bytes -= future.size_bytes
            results.append(FutureResult(future_id, "unknown") if future is None else future.result())
        return results

    async def completions(self, group: str, after: int, wait_s: float) -> Completions:
        """See `RouterAPI.completions`."""
        if not self.incarnation <= after <= self._position:  # of another router
            after = self.incarnation
        state = self._groups.setdefault(group, _Group())
        for position in [position for position in state.ends if position <= after]:
            del state.ends[position]
        if not state.ends:
            await self._wait([state.waiters], wait_s)
        ends = dict(state.ends)
        if not (state.ends or state.waiters) and self._groups.get(group) is state:
            del self._groups[group]
        return Completions(list(ends.values()), max(ends, default=after))

    def report_lost(self, incarnation: int, group: str, ids: Sequence[str]) -> None:
        """See `RouterAPI.report_lost`."""
        if incarnation == self.incarnation:
            return
        for future_id in ids:
            if future_id not in self._by_id:
                self._report(group, Completion(future_id, True))

    def _report(self, group: str, completion: Completion) -> None:
        state = self._groups.setdefault(group, _Group())
        self._position += 1
        state.ends[self._position] = completion
        asyncio.get_running_loop().call_later(self._args.keep_s, self._drop_report, group, self._position)
        for waiter in state.waiters:
            waiter.set()

    def _drop_report(self, group: str, position: int) -> None:
        if (state := self._groups.get(group)) is not None:
            state.ends.pop(position, None)
            if not (state.ends or state.waiters):
                del self._groups[group]

    async def _wait(self, waiters: Sequence[set[asyncio.Event]], wait_s: float) -> None:
        """Waits until one of several calls, or of a group, ends."""
        ended = asyncio.Event()
        for each in waiters:
            each.add(ended)
        try:
            async with asyncio.timeout(min(max(0.0, wait_s), MAX_WAIT_S)):
                await ended.wait()
        except TimeoutError:
            pass
        finally:
            for each in waiters:
                each.discard(ended)

    # -- sessions ----------------------------------------------------------------------------------

    def renew_futures(self, session: str) -> bool:
        """See `RouterAPI.renew_futures`."""
        if session in self._ended_sessions:
            return False
        if session in self._sessions:
            self._renew(session)
        return True

    def end_futures(self, session: str) -> None:
        """See `RouterAPI.end_futures`."""
        self._ended_sessions[session] = None
        if (state := self._sessions.pop(session, None)) is not None:
            state.lease.end()
            for future in list(state.futures.values()):
                self._forget(future)

    def _renew(self, session: str) -> None:
        if (state := self._sessions.get(session)) is None:
            state = self._sessions[session] = _Session(Lease(lambda: self._expire(session)))
        state.lease.renew(timing.FUTURES_LEASE_S)

    def _expire(self, session: str) -> None:
        """Ends the running calls of a silent session."""
        state = self._sessions[session]
        if running := [future for future in state.futures.values() if not future.ended]:
            logger.warning(
                f"session {session} has been silent for {timing.FUTURES_LEASE_S:g} s: {len(running)} calls are given up"
            )
        for future in running:
            self._forget(future)
            self._report(future.group, Completion(future.id, True))
        if state.futures:
            state.lease.renew(timing.FUTURES_LEASE_S)  # its results are still kept
        else:
            del self._sessions[session]

    def close(self) -> None:
        """Cancels all calls."""
        for future in list(self._by_id.values()):
            self._forget(future)
        for session in self._sessions.values():
            session.lease.end()


def response_bytes(response: SampleResponse) -> int:
    """Returns the approximate size of a response in bytes."""
    columns = response.columns
    arrays = [columns.tokens, columns.lengths, columns.logprobs, columns.logprob_tokens, *response.prompts]
    for scores in columns.scores.values():
        arrays += [scores.logprobs, scores.top_tokens, scores.top_logprobs]
    for mask in columns.masks or ():
        arrays += [] if mask is None else [mask.counts, mask.tokens]
    texts = sum(map(len, columns.decoded)) + sum(map(len, columns.whole_text or ()))
    return sum(array.nbytes for array in arrays if array is not None) + texts
