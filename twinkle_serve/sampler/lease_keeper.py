"""Keeps leases at a router alive while this process lives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from twinkle_serve import tasks


async def keep_renewed(renew: Callable[[], Awaitable[None]], period_s: float) -> None:
    """Calls `renew` every `period_s` until cancelled.

    A failed renewal is not reported here: the router may be being replaced, and a lost lease shows where it is used.
    """
    while True:
        await asyncio.sleep(period_s)
        try:
            await renew()
        except (Exception, asyncio.CancelledError):
            if tasks.is_cancelled():
                raise
