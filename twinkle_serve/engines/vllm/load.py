"""Load of vLLM's scheduler, which the core reports on request.

vLLM's own statistics are computed at each step and for each token, in both processes; this costs nothing in between.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twinkle_serve.data_format.telemetry import EngineLoad

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

METHOD = "twinkle_load"
"""Name of the core's method."""

WAIT_S = 0.2
"""How long a query waits for the core; later it returns the last answer."""


def offer_load() -> None:
    """Gives the core of this process the method METHOD."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCoreProc

    preempt = Scheduler._preempt_request

    def count_preemption(scheduler: Any, *args: Any, **options: Any) -> Any:
        scheduler.twinkle_preemptions = getattr(scheduler, "twinkle_preemptions", 0) + 1
        return preempt(scheduler, *args, **options)

    def load(core: Any) -> list[float]:
        scheduler = core.scheduler
        return [
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.kv_cache_manager.usage,
            getattr(scheduler, "twinkle_preemptions", 0),
        ]

    Scheduler._preempt_request = count_preemption
    setattr(EngineCoreProc, METHOD, load)


class LoadQuery:
    """Asks the core for its load, once at a time."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._last = EngineLoad()
        self._query: asyncio.Task[None] | None = None

    async def load(self) -> EngineLoad:
        """Returns the current load, or the last one where the core does not answer at once."""
        if self._query is None or self._query.done():
            self._query = asyncio.create_task(self._ask())
        await asyncio.wait({self._query}, timeout=WAIT_S)
        return self._last

    async def _ask(self) -> None:
        try:
            running, waiting, kv_cache, preemptions = await self._llm.engine_core.call_utility_async(METHOD)
        except Exception:  # the core is gone, which other calls report
            return
        self._last = replace(
            self._last, running=int(running), waiting=int(waiting), kv_cache=kv_cache, preemptions=int(preemptions)
        )
