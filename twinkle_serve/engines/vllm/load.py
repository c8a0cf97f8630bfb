"""Load of vLLM's scheduler, which the core reports on request.

vLLM's own statistics are computed at each step and for each token, in both processes; this costs nothing in between.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twinkle_serve.data_format.telemetry import EngineLoad

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

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
        running, waiting = scheduler.get_request_counts()
        return [running, waiting, scheduler.get_kv_cache_usage(), getattr(scheduler, "twinkle_preemptions", 0)]

    Scheduler._preempt_request = count_preemption
    setattr(EngineCoreProc, METHOD, load)


def stat_loggers(disable_log_stats: bool) -> list[Any] | None:
    """Returns vLLM's logger of its own statistics for Ray's metrics; None where they are off, or Ray is not running.

    vLLM's default logger stays. That for Prometheus, which nobody scrapes in this process, is replaced.
    """
    ray = sys.modules.get("ray")
    if disable_log_stats or ray is None or not ray.is_initialized():
        return None
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    return [RayPrometheusStatLogger]


class LoadQuery:
    """Asks the core for its load, once at a time."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._last = EngineLoad()
        self._query: asyncio.Task[None] | None = None
        self._failed = False

    async def load(self) -> EngineLoad:
        """Returns the current load, or the last one where the core does not answer at once."""
        if self._query is None or self._query.done():
            self._query = asyncio.create_task(self._ask())
        await asyncio.wait({self._query}, timeout=WAIT_S)
        return self._last

    async def _ask(self) -> None:
        try:
            running, waiting, kv_cache, preemptions = await self._llm.engine_core.call_utility_async(METHOD)
        except Exception as error:  # a core that is gone is reported by other calls
            if not self._failed:
                logger.warning(f"vLLM's core does not tell its load: {error}")
            self._failed = True
            return
        self._last = replace(
            self._last, running=int(running), waiting=int(waiting), kv_cache=kv_cache, preemptions=int(preemptions)
        )
