"""One sampling engine as a deployment: engine-dp0, engine-dp1, …, one data-parallel replica each."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ray import serve

from deployments.logging import QUIET
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group
from twinkle_serve.engines import build_engine
from twinkle_serve.engines.base import ChunkRunner, Finished
from twinkle_serve.errors import EngineDeadError, EngineStartError
from twinkle_serve.placement import Placement, cores_of_engine

WARM_UP = Group(id=-1, prompt_ids=np.zeros(1, np.int32), params=SamplingParams(max_tokens=2))


def engine_name(dp_rank: int) -> str:
    """Name of the deployment of a data-parallel rank."""
    return f"engine-dp{dp_rank}"


@serve.deployment(
    # Admission is the router's: whatever it sends is taken.
    max_ongoing_requests=10_000,
    # A dead process is noticed within this period.
    health_check_period_s=2,
    health_check_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=5,
    max_constructor_retry_count=1,
    logging_config=QUIET,
)
class Engine:
    """Runs chunks of groups for the router.

    Guarantees: `sample` yields every group of its chunk once unless it was aborted, or raises, and then all are over.
    Guarantees: when the router cancels a chunk, its groups are aborted.
    Does not guarantee: that a group survives this process. The router keeps it.
    Does not guarantee: that groups end when the router dies. They run to their end, for nobody.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: ServiceArgs, dp_rank: int, placement: Placement
    ) -> None:
        mesh = args.device_mesh.mesh()
        cores: list[tuple[int, ...]] = []
        if placement.device == "cpu":
            mine = sorted(os.sched_getaffinity(0))
            cores = cores_of_engine(dp_rank, mesh.devices_per_replica, placement.devices_per_node, mine)
        name = engine_name(dp_rank)
        model = await asyncio.to_thread(hub.resolve, args.model_id)
        self._engine = build_engine(
            args.engine,
            name,
            str(model),
            args.engine_args,
            device=placement.device,
            tp_size=mesh.tp_size,
            pp_size=mesh.pp_size,
            executor=placement.executor,
            cpus=cores,
            devices_on_node=placement.devices_per_node,
            trust_remote_code=args.trust_remote_code,
        )
        try:
            async with asyncio.timeout(args.startup_timeout_s):
                await self._engine.start()
                # The first sample takes vLLM seconds on CPU; and an engine that cannot sample must not be ready.
                await self._engine.sample_group(WARM_UP)
        except TimeoutError:
            raise EngineStartError(
                f"{name}: {args.model_id} did not load within startup_timeout_s={args.startup_timeout_s:g}. Raise it."
            ) from None
        self._chunks = ChunkRunner(self._engine)
        self._info = replace(self._engine.info, life=uuid.uuid4().hex)

    async def describe(self) -> EngineInfo:
        """What the router must know to use this engine."""
        await self._engine.check_health()
        return self._info

    async def sample(self, life: str, groups: Sequence[Group]) -> AsyncIterator[Finished]:
        """Samples a chunk; see `ChunkRunner.run`.

        Raises:
            EngineDeadError: the chunk was meant for the process that this one replaced. Serve keeps what it could
                not hand to that one, and the router has placed it anew long since.
        """
        if life != self._info.life:
            raise EngineDeadError(f"{self._info.name} was restarted.")
        async for finished in self._chunks.run(groups):
            yield finished

    async def abort(self, attempts: Sequence[Attempt]) -> None:
        """Aborts groups, if they still run. Others of their chunk go on."""
        self._chunks.abort(attempts)

    async def check_health(self) -> None:
        """Called by Serve; an error here has the process replaced."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        engine: Any = getattr(self, "_engine", None)
        if engine is not None:
            await engine.stop()
