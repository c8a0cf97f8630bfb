"""Calls that run: by which id their callers know them, and whether these are still there."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from twinkle_serve.errors import EngineError, RequestError, TwinkleServeError
from twinkle_serve.routing.request import Request


@dataclass(slots=True, eq=False)
class ActiveCall:
    """A call, from when it arrives until it is over."""

    inputs: int
    """How many it has."""
    request: Request | None = None
    """None while it is being understood."""
    error: TwinkleServeError | None = None
    """What has ended it before it was a request."""
    cancelled: set[int] = field(default_factory=set)
    """Inputs that were cancelled before it was one."""
    lease: asyncio.TimerHandle | None = None
    """When it is given up."""

    def cancel(self, inputs: Iterable[int] | None) -> int:
        """Cancels inputs, or all, of a call that is no request yet. Returns how many were not cancelled before."""
        before = len(self.cancelled)
        self.cancelled |= set(range(self.inputs)) if inputs is None else {*inputs} & {*range(self.inputs)}
        return len(self.cancelled) - before


class CallRegistry:
    """Ids and leases of calls.

    Guarantees: an id means one call at a time, the latest that came with it; the one before is given up.
    Guarantees: a call with a lease is given up when the lease is not renewed.
    """

    def __init__(self, give_up: Callable[[Request, TwinkleServeError], None]) -> None:
        """
        Args:
            give_up: ends a request with an error.
        """
        self._give_up = give_up
        self._by_id: dict[str, ActiveCall] = {}
        self._all: set[ActiveCall] = set()

    def __len__(self) -> int:
        return len(self._all)

    @property
    def arriving(self) -> int:
        """Calls that are no requests yet."""
        return sum(live.request is None for live in self._all)

    def get(self, request_id: str) -> ActiveCall | None:
        return self._by_id.get(request_id)

    @contextlib.contextmanager
    def holding(self, inputs: int, request_id: str, lease_s: float | None) -> Iterator[ActiveCall]:
        """Knows a call of so many inputs by its id, "" for none, for as long as it runs."""
        live = ActiveCall(inputs)
        if request_id:
            if (before := self._by_id.get(request_id)) is not None:
                self._end(before, EngineError(f"call {request_id} was sent again, and runs anew."))
            self._by_id[request_id] = live
            if lease_s is not None:
                self._lease(request_id, live, lease_s)
        self._all.add(live)
        try:
            yield live
        finally:
            self._all.discard(live)
            if live.lease is not None:
                live.lease.cancel()
            if self._by_id.get(request_id) is live:
                del self._by_id[request_id]

    def _end(self, live: ActiveCall, error: TwinkleServeError) -> None:
        live.error = error
        if live.request is not None:
            self._give_up(live.request, error)

    def renew(self, request_ids: Iterable[str], lease_s: float) -> None:
        """Their callers are there, and will say so again within `lease_s`."""
        for request_id in request_ids:
            if (live := self._by_id.get(request_id)) is not None:
                self._lease(request_id, live, lease_s)

    def _lease(self, request_id: str, live: ActiveCall, lease_s: float) -> None:
        if live.lease is not None:
            live.lease.cancel()
        gone = EngineError(f"the caller of {request_id} has been silent for {lease_s:g} s: its call is given up.")
        live.lease = asyncio.get_running_loop().call_later(lease_s, self._end, live, gone)


class Rate:
    """Events a second, of about the last MEMORY_S."""

    MEMORY_S = 10.0

    def __init__(self) -> None:
        self._sum = 0.0
        self._at: float | None = None

    def add(self, count: int) -> None:
        self._sum = self._faded() + count

    def per_s(self) -> float:
        return self._faded() / self.MEMORY_S

    def _faded(self) -> float:
        now = asyncio.get_running_loop().time()
        passed = 0.0 if self._at is None else now - self._at
        self._at = now
        self._sum *= math.exp(-passed / self.MEMORY_S)
        return self._sum


def seconds(name: str, value: object) -> float:
    """A number of seconds that a caller gave.

    Raises:
        RequestError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise RequestError(f"{name} must be a number of seconds above 0, got {value!r}.")
    return float(value)
