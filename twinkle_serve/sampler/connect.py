"""Connects to running services, and deploys them."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import ray
from ray import serve

from twinkle_serve import timing
from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import ServiceNotReadyError, unknown_name
from twinkle_serve.remote.reservation import join_or_start
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.base import RunningSampler
from twinkle_serve.sampler.client import ServiceClient
from twinkle_serve.sampler.router_client import RouterClient

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import ApplicationStatusOverview

logger = logging.getLogger(__name__)


def connect(name: str = "sampler", *, timeout_s: float = 180.0) -> RunningSampler:
    """Connects to the sampler of a running application.

    Joins the Ray cluster if this process is in none: RAY_ADDRESS, or the one on this machine.

    Args:
        name: name of the application in the config.
        timeout_s: how long to wait for an application that is still starting, in seconds.

    Raises:
        ServiceNotReadyError: no cluster, no such application, or an application that failed or did not start in time.
    """
    if not ray.is_initialized():
        try:
            _join_cluster()
        except ConnectionError as error:
            if address := os.environ.get("RAY_ADDRESS"):
                raise ServiceNotReadyError(
                    f"no Ray cluster to connect to at RAY_ADDRESS={address}. If one runs there, it may want a token: "
                    "set RAY_AUTH_MODE=token."
                ) from error
            raise ServiceNotReadyError(
                "no Ray cluster to connect to: RAY_ADDRESS is not set and none runs on this machine. "
                "Start the service with scripts/serve."
            ) from error
    if (state := _state_when_running(name, timeout_s)) != "RUNNING":
        raise ServiceNotReadyError(
            f"application {name!r} is still {state} after timeout_s={timeout_s:g}. Raise timeout_s, or see its "
            "deployments with `serve status`."
        )
    return RunningSampler(ServiceClient(serve.get_app_handle(name), name))


def _join_cluster() -> None:
    """Joins the cluster of RAY_ADDRESS or of this machine, without Ray's notices to whoever started it."""
    notices = logging.getLogger("ray._private.authentication.authentication_token_setup")
    level = notices.level
    notices.setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(address="auto", namespace="serve", log_to_driver=False, logging_level="warning")
    finally:
        notices.setLevel(level)


def deploy(name: str, args: ServiceArgs, build: Callable[[ServiceArgs], Application]) -> ServiceClient:
    """Serves an application under a name, next to others; one of that name is replaced. Returns when all its engines
    are ready.

    Joins the Ray cluster as `connect` does, or starts one on this machine.

    Raises:
        ConfigError: invalid arguments; as `build`.
        ServiceNotReadyError: the application did not start; the message has the reason.
    """
    join_or_start(log_to_driver=False)
    if name in serve.status().applications:
        logger.warning(f"application {name!r} is there already: it is replaced; engines go on where nothing changed")
    target = serve.RunTarget(build(args), name=name, route_prefix=None)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    try:
        if _state_when_running(name, args.startup_timeout_s + timing.ROUTER_GRACE_S) != "RUNNING":
            raise ServiceNotReadyError(
                f"application {name!r} was not up within startup_timeout_s={args.startup_timeout_s:g}, and is deleted. "
                "Either its model takes longer, or Ray has no room for its engines: see `ray status`."
            )
        client = ServiceClient(handle, name)
        wait_for_engines(client, args.startup_timeout_s)
    except BaseException:  # the caller gets no object to shut it down with, and some of its engines may be up
        serve.delete(name, _blocking=False)
        raise
    return client


def wait_for_engines(client: RouterClient, timeout_s: float) -> None:
    """Waits until the router of a running application uses all its engines, which it finds one by one.

    Raises:
        ServiceNotReadyError: it did not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        engines = client.loop.call(client.call(timing.CONTROL_TIMEOUT_S, RouterAPI.status))["engines"]
        if not (missing := [name for name, engine in engines.items() if engine["state"] not in ("ready", "drained")]):
            return
        if time.monotonic() > deadline:
            names = ", ".join(missing)
            raise ServiceNotReadyError(f"{names} did not answer within {timeout_s:g} s. See `serve status`.")
        time.sleep(0.05)


def _state_when_running(name: str, timeout_s: float) -> str:
    """Returns RUNNING once an application can be called, or its state after `timeout_s`.

    A handle to an application that failed would wait forever, so its state is checked first.

    Raises:
        ServiceNotReadyError: no such application, or it failed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        applications = serve.status().applications
        if name not in applications:
            raise ServiceNotReadyError(unknown_name("application", name, applications) + ".")
        application = applications[name]
        state = str(application.status.value)
        # UNHEALTHY while an engine is being replaced: the router samples on the others.
        router = application.deployments.get("router")
        if state == "RUNNING" or (state == "UNHEALTHY" and router is not None and router.status == "HEALTHY"):
            return "RUNNING"
        if state in ("DEPLOY_FAILED", "DELETING"):
            raise ServiceNotReadyError(f"application {name!r} is {state}: {failure_reason(application)}")
        if time.monotonic() > deadline:
            return state
        time.sleep(0.2)


def failure_reason(application: ApplicationStatusOverview) -> str:
    """Returns our own error from the traceback in an application's status, or else the whole status message."""
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    for message in messages:
        if found := re.findall(r"^(?:\w+\.)*(\w+Error: .+)$", message, re.MULTILINE):
            return str(found[-1])
    return "\n".join(filter(None, messages))
