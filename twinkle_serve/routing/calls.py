"""Registry of active calls and their leases."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass, field

from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.telemetry import CallInfo
from twinkle_serve.errors import LeaseExpiredError, RequestError, TwinkleServeError
from twinkle_serve.lease import Lease
from twinkle_serve.routing.request import Request
from twinkle_serve.routing.telemetry import Telemetry


@dataclass(slots=True, eq=False)
class ActiveCall:
    """A call, from its arrival to its end."""

    inputs: int
    """Number of its inputs."""
    request: Request | None = None
    """None while the call is being validated, and for a stream."""
    error: TwinkleServeError | None = None
    """Set if the call ended by its lease or another call, before it became a request."""
    cancelled: set[int] = field(default_factory=set)
    """Inputs that were cancelled before the call became a request."""
    lease: Lease | None = None
    """The caller's; None if the call does not depend on it."""
    id: str = ""
    caller: str = ""
    track: str = ""
    began: float = 0.0
    """When it came, by the event loop's clock."""
    deadline: float = math.inf
    """By the same clock."""
    _step: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def step(self, deadline: float) -> AsyncGenerator[None, None]:
        """Runs one step of a stream until the deadline, by the event loop's clock.

        Raises:
            LeaseExpiredError: the lease has expired, at once. RequestError: so when the stream was cancelled.
        """
        try:
            async with asyncio.timeout_at(deadline) as self._step:
                yield
        except TimeoutError:
            self._require_wanted()
            raise
        finally:
            self._step = None
        self._require_wanted()

    def _require_wanted(self) -> None:
        if self.error is not None:
            raise self.error
        if self.cancelled:
            raise RequestError("the stream was cancelled.")

    def end(self, error: TwinkleServeError) -> None:
        """Ends the stream, or a call that is being validated."""
        self.error = error
        self._interrupt()

    def _interrupt(self) -> None:
        if self._step is not None and not self._step.expired():
            self._step.reschedule(0.0)

    def cancel(self, inputs: Iterable[int] | None) -> int:
        """Cancels inputs, or all for None, of a call that is not a request yet. Returns how many were new."""
        before = len(self.cancelled)
        self.cancelled |= set(range(self.inputs)) if inputs is None else {*inputs} & {*range(self.inputs)}
        if self.cancelled:
            self._interrupt()
        return len(self.cancelled) - before


class CallRegistry:
    """Ids and leases of active calls.

    Guarantees:
        An id belongs to one call at a time, the latest that came with it; the earlier one is given up.
        A call with a lease is given up when the lease is not renewed.
    """

    def __init__(self, give_up: Callable[[Request, TwinkleServeError], None], telemetry: Telemetry) -> None:
        """
        Args:
            give_up: ends a request with an error.
            telemetry: counts leases that expire.
        """
        self._telemetry = telemetry
        self._give_up = give_up
        self._by_id: dict[str, ActiveCall] = {}
        self._all: set[ActiveCall] = set()
        self._numbers = itertools.count(1)
        self._of_track: Counter[str] = Counter()
        """Number of active calls of each track."""
        self._requests: Counter[str] = Counter()
        """Number of these that are requests."""

    def __len__(self) -> int:
        return len(self._all)

    def count(self, track: str) -> int:
        """Number of calls of a track."""
        return self._of_track[track]

    def outside_queue(self, track: str) -> int:
        """Number of these whose prompts are in no queue: calls that are being validated, and streams."""
        return self._of_track[track] - self._requests[track]

    def get(self, request_id: str) -> ActiveCall | None:
        """Returns the active call of an id."""
        return self._by_id.get(request_id)

    def infos(self) -> list[CallInfo]:
        """Returns the active calls, the oldest first."""
        now = asyncio.get_running_loop().time()
        return [_info(call, now) for call in sorted(self._all, key=lambda call: call.began)]

    @contextlib.contextmanager
    def holding(
        self,
        inputs: int,
        request_id: str,
        lease_s: float | None,
        *,
        caller: str = "",
        track: str = "",
        deadline: float = math.inf,
    ) -> Iterator[ActiveCall]:
        """Registers a call while it runs.

        Args:
            inputs: number of its inputs.
            request_id: "" for a call without id.
            lease_s: seconds within which its caller renews it; None for a call without lease.
            deadline: by the event loop's clock.
        """
        began = asyncio.get_running_loop().time()
        if not request_id:  # nobody renews it, but it can be cancelled
            request_id, lease_s = f"call-{next(self._numbers)}", None
        call = ActiveCall(inputs, id=request_id, caller=caller, track=track, began=began, deadline=deadline)
        if (replaced := self._by_id.get(request_id)) is not None:
            self._end(replaced, LeaseExpiredError(f"call {request_id} was sent again, and starts anew."))
        self._by_id[request_id] = call
        if lease_s is not None:
            self._renew(request_id, call, lease_s)
        self._all.add(call)
        self._of_track[track] += 1
        try:
            yield call
        finally:
            self._all.discard(call)
            self._of_track[track] -= 1
            self._requests[track] -= call.request is not None
            if call.lease is not None:
                call.lease.end()
            if self._by_id.get(request_id) is call:
                del self._by_id[request_id]

    def became_request(self, call: ActiveCall, request: Request) -> None:
        """Records that a call was validated, and that its prompts are queued."""
        call.request = request
        self._requests[call.track] += 1

    def _end(self, call: ActiveCall, error: TwinkleServeError) -> None:
        call.end(error)
        if call.request is not None:
            self._give_up(call.request, error)

    def _expire(self, call: ActiveCall, silent: str) -> None:
        self._telemetry.count(metrics.EXPIRED_LEASES, 1, "caller")
        self._end(call, LeaseExpiredError(silent))

    def renew(self, request_ids: Iterable[str], lease_s: float) -> None:
        """Extends the leases of calls; unknown ids are ignored."""
        for request_id in request_ids:
            if (call := self._by_id.get(request_id)) is not None:
                self._renew(request_id, call, lease_s)

    def _renew(self, request_id: str, call: ActiveCall, lease_s: float) -> None:
        if call.lease is not None:
            call.lease.end()
        silent = f"the caller of {request_id} has been silent for {lease_s:g} s: its call is given up."
        call.lease = Lease(lambda: self._expire(call, silent))
        call.lease.renew(lease_s)


def _info(call: ActiveCall, now: float) -> CallInfo:
    request = call.request
    adapter = None if request is None else request.adapter
    return CallInfo(
        id=call.id,
        caller=call.caller,
        track=call.track,
        adapter="" if adapter is None else adapter.label,
        age_s=round(now - call.began, 3),
        left_s=None if math.isinf(call.deadline) else round(call.deadline - now, 3),
        prompts=call.inputs,
        samples=0 if request is None else request.samples_wanted,
        samples_done=0 if request is None else request.samples_wanted - request.samples_missing,
        tokens_done=0 if request is None else request.tokens_done,
    )


class Rate:
    """Events per second, averaged over about the last WINDOW_S."""

    WINDOW_S = 10.0

    def __init__(self) -> None:
        self._sum = 0.0
        self._at: float | None = None

    def add(self, count: int) -> None:
        """Counts events that have just happened."""
        self._sum = self._decayed() + count

    def per_s(self) -> float:
        """Returns the current rate."""
        return self._decayed() / self.WINDOW_S

    def _decayed(self) -> float:
        now = asyncio.get_running_loop().time()
        passed = 0.0 if self._at is None else now - self._at
        self._at = now
        self._sum *= math.exp(-passed / self.WINDOW_S)
        return self._sum
