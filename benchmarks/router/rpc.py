"""CPU cost of the router's calls to an engine in the router's process, with no work done at either end."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
from ray import serve
from ray.serve.handle import DeploymentHandle

from benchmarks.common.report import Figures, quartiles
from deployments.engine_client import ServeEngineClient
from deployments.log_config import QUIET
from twinkle_serve.data_format.groups import Group, Session
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.group_runner import Finished

GROUPS, SAMPLES, TOKENS = 4, 8, 300
"""Size of a chunk, which comes back in one item."""
CALLS = 500
"""Chunks and items in a round."""
SESSION = Session(incarnation="", router="")


@serve.deployment(max_ongoing_requests=1000, logging_config=QUIET)
class Callee:
    """Accepts chunks, and returns as many items as the session's epoch."""

    async def submit(self, session: Session, groups: Sequence[Group], more: bool) -> None: ...

    async def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        rows, rng = GROUPS * SAMPLES, np.random.default_rng(0)
        columns = SampleColumns(
            group=np.arange(rows, dtype=np.int64) // SAMPLES,
            sample=np.arange(rows, dtype=np.int32) % SAMPLES,
            lengths=np.full(rows, TOKENS, np.int32),
            tokens=rng.integers(0, 1000, rows * TOKENS).astype(np.int32),
            logprobs=rng.normal(size=(rows * TOKENS, 1)).astype(np.float32),
            logprob_tokens=None,
            stop_reason=np.zeros(rows, np.uint8),
            decoded=["x" * TOKENS] * rows,
            seed=np.zeros(rows, np.int64),
            engine=["engine-dp0"] * rows,
            adapter=[""] * rows,
            weight_versions=[(("initial", 0),)] * rows,
        )
        for _ in range(session.epoch):
            yield Finished(columns=columns)


@serve.deployment(max_ongoing_requests=1000, logging_config=QUIET)
class Caller:
    """Calls like the router, and measures the CPU time of its own process."""

    def __init__(self, callee: DeploymentHandle) -> None:
        self._client = ServeEngineClient(callee)

    async def submits(self, count: int) -> float:
        """Returns CPU ms per sent chunk."""
        params = DecodingParams()
        ids = np.random.default_rng(0).integers(0, 1000, (GROUPS, 256)).astype(np.int32)
        groups = [Group(id=i, prompt_ids=row, params=params, count=SAMPLES) for i, row in enumerate(ids)]
        started = time.process_time()
        for _ in range(count):
            await self._client.submit(SESSION, groups)
        return (time.process_time() - started) / count * 1e3

    async def items(self, count: int) -> float:
        """Returns CPU ms per received item."""
        started = time.process_time()
        async for _ in self._client.results(Session(incarnation="", router="", epoch=count)):
            pass
        return (time.process_time() - started) / count * 1e3


async def rpc(options: argparse.Namespace) -> Figures:
    """CPU ms of the router's process per sent chunk and per returned item."""
    caller: Any = Caller
    callee: Any = Callee
    handle = await asyncio.to_thread(serve.run, caller.bind(callee.bind()), name="rpc", route_prefix=None)
    spent: dict[str, list[float]] = {"chunk_ms": [], "item_ms": []}
    for number in range(options.rounds + 1):
        chunk_ms, item_ms = await handle.submits.remote(CALLS), await handle.items.remote(CALLS)
        if number:  # the first round warms both up
            spent["chunk_ms"].append(chunk_ms)
            spent["item_ms"].append(item_ms)
    await asyncio.to_thread(serve.delete, "rpc")
    return {name: quartiles(values) for name, values in spent.items()}
