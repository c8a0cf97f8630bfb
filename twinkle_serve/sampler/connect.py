"""Connects to running services, and deploys them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import ray
from ray import serve

from twinkle_serve import timing
from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import ConfigError, ServiceNotReadyError, unknown_name
from twinkle_serve.remote.applications import deploying, require_own
from twinkle_serve.remote.clusters import LOCAL, find_cluster, is_at, join_cluster, serve_command
from twinkle_serve.remote.reservation import join_or_start
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.base import RunningSampler
from twinkle_serve.sampler.client import ServiceClient
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.validation import finite_number

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import ApplicationStatusOverview

logger = logging.getLogger(__name__)


def connect(name: str = "sampler", *, address: str | None = None, timeout_s: float = 180.0) -> RunningSampler:
    """Connects to the sampler of a running application.

    Joins a Ray cluster if this process is in none: that of `address`, else of RAY_ADDRESS, else the one that was
    started with the same RAY_TMPDIR, or, where that is not set, the one on this machine. Ray's token is found where Ray
    keeps it: in RAY_AUTH_TOKEN, at RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token.

    Args:
        name: name of the application in the config.
        address: host:port of the Ray cluster, as `scripts/serve` prints it.
        timeout_s: how long to wait for an application that is still starting, in seconds.

    Raises:
        ServiceNotReadyError: no cluster, no such application, or an application that failed or did not start in time.
        ConfigError: this process is in another cluster than that of `address`; or an invalid argument.
    """
    if not isinstance(name, str):
        raise ConfigError(f"connect: name must be a string, got {name!r}.")
    if address is not None and not isinstance(address, str):
        raise ConfigError(f"connect: address must be host:port, got {address!r}.")
    if finite_number("connect: timeout_s", timeout_s, error=ConfigError) < 0:
        raise ConfigError(f"connect: timeout_s must be at least 0, got {timeout_s}.")
    if ray.is_initialized():
        if address is not None and not is_at(address):
            raise ConfigError(
                f"this process is in the Ray cluster at {ray.get_runtime_context().gcs_address} already, not at "
                f"address={address}. Leave address out, or call ray.shutdown() first."
            )
    else:
        _join(address)
    if (state := _state_when_running(name, timeout_s)) != "RUNNING":
        raise ServiceNotReadyError(
            f"application {name!r} is still {state} after timeout_s={timeout_s:g}. Raise timeout_s, or see its "
            f"deployments with {serve_command('status')}."
        )
    return RunningSampler(ServiceClient(serve.get_app_handle(name), name))


def _join(address: str | None) -> None:
    """Joins the cluster of `address` or of this machine, without Ray's notices to whoever started it."""
    found = find_cluster(address)
    if found is None or found.address == LOCAL:
        where = (
            f"with {found.source} Ray would start a new one" if found else "RAY_ADDRESS is not set and none runs here"
        )
        raise ServiceNotReadyError(f"no Ray cluster to connect to: {where}. Start the service with scripts/serve.")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    join_cluster(found)


def deploy(
    name: str, args: ServiceArgs, build: Callable[[ServiceArgs], Application], *, replace: bool = False
) -> ServiceClient:
    """Serves an application under a name, next to others. Returns when all its engines are ready.

    Joins the Ray cluster as `connect` does, or starts one on this machine. An application of that name is replaced if
    this job has deployed it, or one that is over.

    Args:
        replace: replace it, whoever has deployed it.

    Raises:
        ConfigError: invalid arguments; as `build`.
        NotOwnerError: another running job, or `serve`, has deployed an application of this name.
        ServiceNotReadyError: the application did not start; the message has the reason.
    """
    join_or_start(log_to_driver=False)
    with deploying(name):
        if not replace:
            require_own(name, "replaced", "Give the sampler another remote_group, or set replace=True.")
        if name in serve.status().applications:
            logger.warning(
                f"application {name!r} is there already: it is replaced; engines go on where nothing changed"
            )
        target = serve.RunTarget(build(args), name=name, route_prefix=None)
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
    try:
        if _state_when_running(name, args.startup_timeout_s + timing.ROUTER_GRACE_S) != "RUNNING":
            raise ServiceNotReadyError(
                f"application {name!r} was not up within startup_timeout_s={args.startup_timeout_s:g}, and is deleted. "
                "Either its model takes longer, or Ray has no room for its engines: see its dashboard."
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
            raise ServiceNotReadyError(f"{names} did not answer within {timeout_s:g} s. See {serve_command('status')}.")
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
