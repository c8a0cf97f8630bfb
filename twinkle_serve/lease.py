"""Leases: what expires unless its holder renews it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from twinkle_serve import timing


class Lease:
    """Calls `on_expiry` once, when it has not been renewed for as long as its last renewal said.

    Guarantees:
        A stall of this process longer than LATE_TIMER_S does not expire it: the lease starts again.
    """

    def __init__(self, on_expiry: Callable[[], None]) -> None:
        """Creates a lease that does not run yet."""
        self._on_expiry = on_expiry
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether it will expire unless it is renewed or ended."""
        return self._timer is not None

    def renew(self, period_s: float) -> None:
        """Starts the period anew, on the running event loop."""
        self.end()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(period_s, self._expire, loop.time() + period_s, period_s)

    def end(self) -> None:
        """Stops the lease without expiry. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self, due: float, period_s: float) -> None:
        if asyncio.get_running_loop().time() - due > timing.LATE_TIMER_S:
            self.renew(period_s)
            return
        self._timer = None
        self._on_expiry()
