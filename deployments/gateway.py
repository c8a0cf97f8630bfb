"""The HTTP gateway as a deployment: the ingress of its own application."""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from deployments.log_config import QUIET, log_to_serve
from twinkle_serve.collection import freeze_start_up
from twinkle_serve.errors import ServiceNotReadyError
from twinkle_serve.gateway.app import build_app
from twinkle_serve.gateway.config import GatewayArgs
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.keys import Keys
from twinkle_serve.gateway.samplers import Samplers
from twinkle_serve.parent import end_with_parent
from twinkle_serve.placement import SIDE_CPUS
from twinkle_serve.sampler.client import ServiceClient


@serve.ingress()
class Gateway:
    """Answers HTTP requests, by calls to routers."""

    def __init__(self, args: GatewayArgs, keys: Keys) -> None:
        log_to_serve(refusals=False)
        end_with_parent(os.getppid())  # Serve's replicas outlive the raylet that started them
        self._clients: dict[str, ServiceClient] = {}
        self._context = GatewayContext(args, keys, Samplers(args.samplers, self._client))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = build_app(self._context)
        freeze_start_up()
        return app

    def _client(self, application: str) -> ServiceClient:
        """Returns the client of an application, once Serve knows that.

        Raises:
            ServiceNotReadyError: it does not.
        """
        if (client := self._clients.get(application)) is None:
            try:
                handle: Any = serve.get_app_handle(application)
            except RayServeException:
                raise ServiceNotReadyError(f"the sampler {application!r} is starting, or is not deployed.") from None
            client = self._clients[application] = ServiceClient(handle, application)
        return client


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
