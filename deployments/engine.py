"""One sampling engine as a deployment: engine-dp0, engine-dp1, …, one data-parallel replica each."""

from __future__ import annotations

import asyncio
import os
from functools import partial

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle

from deployments.log_config import QUIET, log_to_serve
from deployments.progress import StageReporter
from deployments.store_client import ServeStoreClient
from twinkle_serve import hub, timing
from twinkle_serve.channel import Address as ConnectionAddress
from twinkle_serve.channel import Listener
from twinkle_serve.channel_calls import MethodServer
from twinkle_serve.collection import freeze_start_up
from twinkle_serve.config import ServiceArgs, traces_of
from twinkle_serve.cores import CoreClaims
from twinkle_serve.data_format.groups import Chunk, Session
from twinkle_serve.engines import build_engine
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.parent import end_with_parent
from twinkle_serve.placement import Placement, cores_of_devices, cores_of_engine
from twinkle_serve.remote.inbox import Address, Inbox
from twinkle_serve.remote.reservation import enter_group

CONNECTED_CALLS = ("load_adapter",)
"""Calls of `EngineClient` that also come over a connection: through a Serve handle, each takes 6 ms more."""


def engine_name(dp_rank: int) -> str:
    """Returns the name of the deployment of a data-parallel rank."""
    return f"engine-dp{dp_rank}"


class Engine(EngineServer):
    """An `EngineServer` that builds its engine.

    Guarantees:
        `results` yields every submitted sample once, unless it was aborted, or raises.
        When the router cancels `results`, or dies, everything is aborted.
    Does not guarantee:
        That a group survives this process. The router keeps it.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: ServiceArgs, dp_rank: int, track: str, placement: Placement, store: DeploymentHandle
    ) -> None:
        log_to_serve(refusals=False)
        end_with_parent(os.getppid())  # Serve's replicas outlive the raylet that started them
        self._listener = Listener()
        on_stage = StageReporter()
        mesh = args.device_mesh.mesh()
        self._claims = CoreClaims()  # until this process ends
        cores = _take_devices(dp_rank, mesh.devices_per_replica, placement, self._claims)
        name = engine_name(dp_rank)
        if placement.group is not None:
            application = serve.get_replica_context().app_name
            await asyncio.to_thread(enter_group, placement.group, placement.engines[dp_rank], application)
        on_stage("fetching")
        model = await asyncio.to_thread(hub.resolve, args.model_id, revision=args.revision)
        on_stage("importing")
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
        super().__init__(engine, model, ServeStoreClient(store), traces_of(args.traces, "engine"), track=track)
        await self.start(name, args.startup_timeout_s, on_stage)
        freeze_start_up()
        on_stage("ready")

    async def actor(self) -> ActorHandle[object]:
        """Returns this process. A task of an actor fails as soon as its process ends."""
        return ray.get_runtime_context().current_actor

    async def control_address(self) -> ConnectionAddress:
        """Returns the address for a connection that carries calls of CONNECTED_CALLS."""
        methods = {name: getattr(self, name) for name in CONNECTED_CALLS}
        return await self._listener.open(ray.util.get_node_ip_address(), MethodServer(methods).channel)

    async def address(self, session: Session) -> Address[Chunk]:
        """Returns where the chunks of a session are sent to.

        Raises:
            EngineDeadError: the session belongs to another process, or is over.
        """
        lease = self._lease_of(session)
        inbox: Inbox[Chunk] = Inbox(self.take, partial(self.chunk_was_lost, session))
        lease.at_end.append(inbox.close)
        return Address(await self.actor(), inbox.name)

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        if hasattr(self, "_engine"):  # not if the constructor failed
            await self.stop()


engine_deployment = serve.deployment(
    # The router does admission: an engine takes whatever it sends, and a control call never queues behind samples.
    max_ongoing_requests=10_000,
    # A dead process is noticed within this period.
    health_check_period_s=2,
    health_check_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=timing.ENGINE_SHUTDOWN_S,
    max_constructor_retry_count=1,
    logging_config=QUIET,
)(Engine)


def _take_devices(
    dp_rank: int, devices_per_replica: int, placement: Placement, claims: CoreClaims
) -> list[tuple[int, ...]]:
    """Restricts this process to its own devices. Returns the cores of each, on CPU."""
    devices = placement.engines[dp_rank] if placement.engines else ()
    if placement.device == "cuda":
        if devices:  # Ray gave this actor none: the group holds them. Nothing has loaded CUDA yet.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(device.id for device in devices)
        return []
    cores = sorted(os.sched_getaffinity(0))
    if devices:
        return cores_of_devices(devices, cores)
    return claims.take(cores_of_engine(dp_rank, devices_per_replica, placement.devices_per_node, cores), cores)
