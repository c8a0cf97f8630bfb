"""One sampling engine as a deployment: engine-dp0, engine-dp1, …, one data-parallel replica each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.log_config import QUIET
from deployments.store import ServeStoreClient
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group, Session, TextDelta
from twinkle_serve.engines import build_engine
from twinkle_serve.engines.base import Finished
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.placement import Placement, cores_of_devices, cores_of_engine
from twinkle_serve.remote.reservation import enter_group


def engine_name(dp_rank: int) -> str:
    """Name of the deployment of a data-parallel rank."""
    return f"engine-dp{dp_rank}"


@serve.deployment(
    # Admission is the router's: whatever it sends is taken, and a control call waits behind no sample.
    max_ongoing_requests=10_000,
    # A dead process is noticed within this period.
    health_check_period_s=2,
    health_check_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.5,
    # Longer than the fleet's LEAVE_S, and no longer: on Ctrl-C, samples whose router is gone last until then.
    graceful_shutdown_timeout_s=8,
    max_constructor_retry_count=1,
    logging_config=QUIET,
)
class Engine:
    """An `EngineServer` behind handles: the router's `EngineClient`.

    Guarantees: `results` yields every sample that was submitted once, unless it was aborted, or raises.
    Guarantees: when the router cancels that, everything is aborted; and soon after the router has died.
    Does not guarantee: that a group survives this process. The router keeps it.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: ServiceArgs, dp_rank: int, placement: Placement, store: DeploymentHandle
    ) -> None:
        mesh = args.device_mesh.mesh()
        cores = _take_devices(dp_rank, mesh.devices_per_replica, placement)
        name = engine_name(dp_rank)
        if placement.group is not None:
            application = serve.get_replica_context().app_name
            await asyncio.to_thread(enter_group, placement.group, placement.engines[dp_rank], application)
        model = await asyncio.to_thread(hub.resolve, args.model_id, revision=args.revision)
        engine = build_engine(
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
        self._host = EngineServer(engine, model, ServeStoreClient(store))
        await self._host.start(name, args.startup_timeout_s)

    async def describe(self, router: str) -> EngineInfo:
        return await self._host.describe(router)

    async def submit(self, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        await self._host.submit(session, groups, more)

    async def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        async with aclosing(self._host.results(session)) as items:
            async for finished in items:
                yield finished

    async def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        async with aclosing(self._host.stream(session, group)) as deltas:
            async for delta in deltas:
                yield delta

    async def abort(self, session: Session, attempts: Sequence[Attempt]) -> None:
        await self._host.abort(session, attempts)

    async def control(self, method: str, *args: Any) -> Any:
        return await self._host.control(method, *args)

    async def check_health(self) -> None:
        """Called by Serve; an error here has the process replaced."""
        await self._host.check_health()

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        host: Any = getattr(self, "_host", None)
        if host is not None:
            await host.stop()


def _take_devices(dp_rank: int, devices_per_replica: int, placement: Placement) -> list[tuple[int, ...]]:
    """Sees to it that this process uses its own devices alone. Returns the cores of each, on CPU."""
    mine = placement.engines[dp_rank] if placement.engines else ()
    if placement.device == "cuda":
        if mine:  # Ray gave this actor none: the group holds them. Nothing has loaded CUDA yet.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(device.id for device in mine)
        return []
    cores = sorted(os.sched_getaffinity(0))
    if mine:
        return cores_of_devices(mine, cores)
    return cores_of_engine(dp_rank, devices_per_replica, placement.devices_per_node, cores)
