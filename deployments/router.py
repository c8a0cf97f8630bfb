"""The router as a deployment: the ingress of the application."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Mapping

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.engine_client import ServeEngineClient
from deployments.light_imports import import_transformers_without_torch
from deployments.log_config import QUIET, log_to_serve
from deployments.metrics import RayMetrics
from deployments.sessions_client import ServeSessionsClient
from deployments.store_client import ServeStoreClient
from twinkle_serve import hub
from twinkle_serve.channel import Address, Listener
from twinkle_serve.collection import freeze_start_up
from twinkle_serve.config import ServiceArgs, traces_of
from twinkle_serve.parent import end_with_parent
from twinkle_serve.placement import SIDE_CPUS
from twinkle_serve.routing import router as routing
from twinkle_serve.routing.caller_session import CallerSession

SWITCH_S = 0.0005
"""Longest time that one thread of the router's process keeps the others waiting. A call passes through several threads:
with Python's default of 5 ms, control calls take 100 ms and more while another call's prompts are encoded."""


class Router(routing.Router):
    """A `routing.Router` that reaches its engines and store through Serve handles."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: ServiceArgs, engines: Mapping[str, DeploymentHandle], store: DeploymentHandle
    ) -> None:
        log_to_serve(refusals=True)
        end_with_parent(os.getppid())  # Serve's replicas outlive the raylet that started them
        sys.setswitchinterval(SWITCH_S)
        await asyncio.to_thread(import_transformers_without_torch)
        model = await asyncio.to_thread(hub.resolve, args.model_id, revision=args.revision, weights=False)
        super().__init__(
            args,
            model,
            {name: ServeEngineClient(handle) for name, handle in engines.items()},
            ServeStoreClient(store),
            sessions=ServeSessionsClient(store),
            sink=RayMetrics(),
            traces=traces_of(args.traces, "router"),
        )
        self._listener = Listener()
        await self.start()
        freeze_start_up()

    async def reconfigure(self, config: Mapping[str, Mapping[str, str]]) -> None:
        """Called by Serve after `__init__`, and when the application is deployed with other engines.

        Args:
            config: `engines`, the track of each, by the name of its deployment.
        """
        handles = [await asyncio.to_thread(serve.get_deployment_handle, name) for name in config["engines"]]
        clients = {handle.deployment_name: ServeEngineClient(handle) for handle in handles}
        self.set_engines(clients, config["engines"])

    async def answers(self) -> AsyncGenerator[Address, None]:
        """Opens a session of calls, and ends with it. Yields the address for its connection; see `CallerSession`."""
        session = CallerSession(self)
        await self._listener.start(ray.util.get_node_ip_address())
        address = self._listener.expect(session.channel)
        try:
            yield address
            await session.run()
        finally:
            self._listener.forget(address)


router_deployment = serve.deployment(
    name="router",
    ray_actor_options={"num_cpus": SIDE_CPUS},
    # A dead process is noticed within this period.
    health_check_period_s=1,
    # Requests queue in the router, where they can be counted and cancelled, not in Serve.
    max_ongoing_requests=100_000,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=5,
    max_constructor_retry_count=1,
    logging_config=QUIET,
)(Router)
