"""The HTTP gateway as a deployment: the ingress of its own application."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments.listener import Listener, bind
from deployments.log_config import QUIET, log_to_serve
from deployments.metrics import RayMetrics
from deployments.sessions_client import ServeSessionsClient
from twinkle_serve.collection import freeze_start_up
from twinkle_serve.config import traces_of
from twinkle_serve.errors import ServiceNotReadyError
from twinkle_serve.gateway.app import build_app
from twinkle_serve.gateway.config import GatewayArgs
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.keys import Keys
from twinkle_serve.gateway.samplers import Connect, Samplers
from twinkle_serve.parent import end_with_parent
from twinkle_serve.placement import SIDE_CPUS
from twinkle_serve.sampler.client import ServiceClient


class ServeConnect(Connect):
    """Reaches applications of this Serve instance."""

    def __init__(self) -> None:
        self._routers: dict[str, ServiceClient] = {}
        self._sessions: dict[str, ServeSessionsClient] = {}

    def router(self, application: str) -> ServiceClient:
        if (client := self._routers.get(application)) is None:
            handle: Any = _require(application, lambda: serve.get_app_handle(application))
            client = self._routers[application] = ServiceClient(handle, application)
        return client

    def sessions(self, application: str) -> ServeSessionsClient:
        if (client := self._sessions.get(application)) is None:
            handle = _require(application, lambda: serve.get_deployment_handle("store", application))
            client = self._sessions[application] = ServeSessionsClient(handle)
        return client


def _require(application: str, handle: Callable[[], DeploymentHandle]) -> DeploymentHandle:
    """Returns a handle. Raises ServiceNotReadyError while Serve does not know the application."""
    try:
        return handle()
    except RayServeException:
        raise ServiceNotReadyError(f"the sampler {application!r} is starting, or is not deployed.") from None


@serve.ingress()
class Gateway:
    """Answers HTTP requests, by calls to routers: at its own address, and those of Serve's proxy."""

    def __init__(self, args: GatewayArgs, keys: Keys) -> None:
        log_to_serve(refusals=False)
        end_with_parent(os.getppid())  # Serve's replicas outlive the raylet that started them
        samplers = Samplers(args.samplers, ServeConnect())
        self._context = GatewayContext(args, keys, samplers, RayMetrics(), traces_of(args.traces, "gateway"))
        self._listener: Listener | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = build_app(self._context)
        if (listen := self._context.args.listen) is not None:
            owner = _owner()
            self._listener = Listener(app, bind(listen, owner), owner)
        freeze_start_up()
        return app

    async def __del__(self) -> None:
        """Called by Serve as the replica ends, once the proxy's requests have."""
        if self._listener is not None:
            await self._listener.close()
        if (traces := self._context.traces) is not None:
            traces.close()


def _owner() -> str:
    """Returns what the replicas of this gateway, and no others, have in common."""
    cluster = ray.get_runtime_context().gcs_address
    return hashlib.sha256(f"{cluster} {serve.get_replica_context().app_name}".encode()).hexdigest()


gateway_deployment = serve.deployment(
    name="gateway",
    ray_actor_options={"num_cpus": SIDE_CPUS},
    health_check_period_s=2,
    # Requests queue in the router, where they take turns and can be cancelled, not in Serve.
    max_ongoing_requests=100_000,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=5,
    max_constructor_retry_count=1,
    logging_config=QUIET,
)(Gateway)
