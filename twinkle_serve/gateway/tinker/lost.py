"""Futures whose router has ended, for clients that wait for a list of ends and would not learn of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from cachetools import LRUCache

from twinkle_serve import timing
from twinkle_serve.data_format.futures import Submission
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.gateway.samplers import Sampler
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.tasks import BackgroundTasks

PERIOD_S = 2.0
"""How often a router is asked whether it is still the same."""
MAX_WATCHED = 200_000
"""Futures that are remembered; a client with more of them waits for those that are not, until it gives up."""


class LostFutures:
    """Tells a new router which futures the previous one had taken, so that clients sample them anew.

    Guarantees:
        - A future that this process has submitted and that ends with its router is reported as failed.
    Does not guarantee:
        - That, if this process ends at the same time as the router.
    """

    def __init__(self) -> None:
        self._taken: LRUCache[str, tuple[Sampler, int, str]] = LRUCache(MAX_WATCHED)
        """Sampler, incarnation of its router and group, by the future's id."""
        self._tasks = BackgroundTasks()
        self._watching = False

    def watch(self, sampler: Sampler, incarnation: int, submission: Submission) -> None:
        """Remembers a future that a router has taken."""
        self._taken[submission.id] = (sampler, incarnation, submission.group)
        if not self._watching:
            self._watching = True
            self._tasks.spawn(self._watch())

    def forget(self, ids: Iterable[str]) -> None:
        """Forgets futures that are collected or given up."""
        for future_id in ids:
            self._taken.pop(future_id, None)

    async def _watch(self) -> None:
        try:
            while self._taken:
                await asyncio.sleep(PERIOD_S)
                for sampler in {sampler for sampler, _, _ in self._taken.values()}:
                    with contextlib.suppress(TwinkleServeError):  # the next router answers later
                        await self._report(sampler)
        finally:
            self._watching = False

    async def _report(self, sampler: Sampler) -> None:
        """Reports the futures of a sampler's earlier routers."""
        current = await sampler.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.incarnation)
        lost: dict[tuple[int, str], list[str]] = {}
        for future_id, (each, incarnation, group) in list(self._taken.items()):
            if each is sampler and incarnation != current:
                lost.setdefault((incarnation, group), []).append(future_id)
        for (incarnation, group), ids in lost.items():
            await sampler.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.report_lost, incarnation, group, ids)
            self.forget(ids)
