"""Requests that run: by which id their callers know them, and whether these are still there."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from twinkle_serve.errors import EngineError, RequestError, TwinkleServeError
from twinkle_serve.routing.request import Request


@dataclass(slots=True)
class _Live:
    request: Request
    end: asyncio.TimerHandle | None = None
    """When it is given up."""


class LiveRequests:
    """Ids and leases of requests.

    Guarantees: an id means one request at a time, the latest that came with it; the one before is given up.
    Guarantees: a request with a lease is given up when the lease is not renewed.
    """

    def __init__(self, give_up: Callable[[Request, TwinkleServeError], None]) -> None:
        """
        Args:
            give_up: ends a request with an error.
        """
        self._give_up = give_up
        self._by_id: dict[str, _Live] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, request_id: str) -> Request | None:
        live = self._by_id.get(request_id)
        return None if live is None else live.request

    @contextlib.contextmanager
    def holding(self, request: Request, request_id: str, lease_s: float | None) -> Iterator[None]:
        """Knows a request by its id, "" for none, for as long as it runs."""
        live = _Live(request)
        if request_id:
            if (before := self._by_id.get(request_id)) is not None:
                self._give_up(before.request, EngineError(f"call {request_id} was sent again, and runs anew."))
            self._by_id[request_id] = live
            if lease_s is not None:
                self._lease(request_id, live, lease_s)
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            if live.end is not None:
                live.end.cancel()
            if self._by_id.get(request_id) is live:
                del self._by_id[request_id]

    def renew(self, request_ids: Iterable[str], lease_s: float) -> None:
        """Their callers are there, and will say so again within `lease_s`."""
        for request_id in request_ids:
            if (live := self._by_id.get(request_id)) is not None:
                self._lease(request_id, live, lease_s)

    def _lease(self, request_id: str, live: _Live, lease_s: float) -> None:
        if live.end is not None:
            live.end.cancel()
        gone = EngineError(f"the caller of {request_id} has been silent for {lease_s:g} s: its call is given up.")
        live.end = asyncio.get_running_loop().call_later(lease_s, self._give_up, live.request, gone)


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
