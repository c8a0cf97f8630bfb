"""Latency of control calls while prompts wait."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray import serve

from benchmarks.common.report import Figures
from benchmarks.router.service import prompts_of, started

QUEUED = 10_000
PERIOD_S = 0.02
IDLE_S = 5.0
WATCH_S = 20.0


@ray.remote(num_cpus=0)
class Prober:
    """Calls `status`, in a separate process."""

    def __init__(self, name: str) -> None:
        self._handle = serve.get_app_handle(name)

    async def watch(self, seconds: float, until_empty: bool) -> tuple[list[float], int]:
        """Calls every PERIOD_S, whether or not the last call was answered. Returns latencies, s, and the most groups
        seen waiting."""
        latencies: list[float] = []
        waiting = [0]
        over = asyncio.Event()

        async def ask() -> None:
            sent = time.perf_counter()
            async with asyncio.timeout(60):
                status = await self._handle.status.remote()
            latencies.append(time.perf_counter() - sent)
            waiting.append(status["groups_waiting"])
            if until_empty and max(waiting) and not waiting[-1]:
                over.set()

        began = time.perf_counter()
        asked: list[asyncio.Task[None]] = []
        while not over.is_set() and (due := len(asked) * PERIOD_S) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            asked.append(asyncio.create_task(ask()))
        await asyncio.gather(*asked)
        return latencies, max(waiting)


async def control(options: argparse.Namespace) -> Figures:
    """Latency of `status` on an idle service, and while 10,000 prompts wait, of one call or of ten.

    The fake engine does 500 prompts per second with little CPU, so queues last for about 20 s.
    """
    name = "queued"
    sampler = await started(name, "fake", {"token_latency_s": 1.0, "max_num_seqs": 4000})
    prober: Any = Prober
    prober = prober.remote(name)
    figures = {"idle": _latencies(await prober.watch.remote(IDLE_S, False))}
    for count in (1, 10):
        prompts = prompts_of(QUEUED, count)
        size = QUEUED // count
        watching = prober.watch.remote(WATCH_S, True)
        await asyncio.sleep(5 * PERIOD_S)  # the prober's calls are under way
        sent = [
            asyncio.create_task(sampler.sample_async(prompts[i : i + size], {"max_tokens": 1}, num_samples=8))
            for i in range(0, QUEUED, size)
        ]
        figures[f"{count} calls of {size}"] = _latencies(await watching)
        await asyncio.gather(*sent)
    await asyncio.to_thread(serve.delete, name)
    return figures


def _latencies(watched: tuple[Sequence[float], int]) -> Figures:
    values, waiting = watched
    marks = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "max_ms": 100}
    percentiles = {mark: round(float(np.percentile(values, at)) * 1e3, 1) for mark, at in marks.items()}
    return {**percentiles, "calls": len(values), "most_waiting": waiting}
