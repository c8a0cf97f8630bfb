"""The Ray cluster and the Serve instance of a launcher."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle_serve.errors import ConfigError, TwinkleServeError

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema


CONNECT_S = 10.0


class LaunchError(TwinkleServeError):
    """Ray, Serve or an application did not start, or Ray has ended."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster that this process is in."""

    address: str
    """For RAY_ADDRESS of other processes: host:port."""
    dashboard_url: str
    """host:port; empty where there is no dashboard."""
    joined: bool
    """Whether it existed before."""
    needs_token: bool
    """Whether its dashboard asks for a token."""


def join_or_start(applications: Collection[str]) -> Cluster:
    """Joins the cluster of RAY_ADDRESS, or starts one that ends with this process.

    Raises:
        ConfigError: the cluster serves applications other than these.
        LaunchError: there is no cluster at RAY_ADDRESS, or Ray did not start.
    """
    import ray
    from ray import serve

    address = os.environ.get("RAY_ADDRESS") or "local"
    _require_listener(address)
    try:
        context = ray.init(address=address, namespace="serve")
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        if address == "local":
            raise LaunchError(f"Ray did not start: {error}") from error
        raise LaunchError(
            f"no Ray cluster at RAY_ADDRESS={address}: {error} Start it, or unset RAY_ADDRESS."
        ) from error
    joined = address != "local"
    others = set(serve.status().applications) - set(applications) if joined else set()
    if others:
        raise ConfigError(
            f"the cluster at {address} serves {', '.join(sorted(others))} too, and deploying this config would delete "
            "what it does not name. Name them in it, or unset RAY_ADDRESS."
        )
    return Cluster(
        address=str(context.address_info["gcs_address"]),
        dashboard_url=str(context.dashboard_url or ""),
        joined=joined,
        needs_token=os.environ.get("RAY_AUTH_MODE") == "token",
    )


def _require_listener(address: str) -> None:
    """Refuses an address where nothing listens: Ray would go on trying for minutes.

    Raises:
        LaunchError
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal():  # auto, local
        return
    try:
        socket.create_connection((host.removeprefix("ray://").strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise LaunchError(
            f"no Ray cluster at RAY_ADDRESS={address}: {error.strerror or error}. Start it, or unset RAY_ADDRESS."
        ) from error


def start_serve(schema: ServeDeploySchema) -> None:
    """Starts Serve as `serve run` does; one that runs already stays as it is.

    Raises:
        LaunchError: it did not start; its HTTP port may be in use.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import gRPCOptions

    try:
        serve.start(
            proxy_location=schema.proxy_location,
            http_options=schema.http_options.model_dump(),
            grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
            controller_options=schema.controller_options,
        )
    except (RayError, RuntimeError, TimeoutError, ValueError) as error:
        remedy = " Set http_options.port to a free one." if "bind" in str(error) else ""
        raise LaunchError(f"Serve did not start: {_last_line(error)}{remedy}") from error


def submit(schema: ServeDeploySchema) -> None:
    """Deploys the applications of a config; applications that it does not name are deleted.

    Raises:
        LaunchError: Serve refuses the config.
    """
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client

    try:
        _get_global_client().deploy_apps(schema)
    except (RayError, RuntimeError) as error:
        raise LaunchError(f"Serve refuses the config: {_last_line(error)}") from error


def dead_process() -> str | None:
    """Returns the name of an essential Ray process that has ended, if this process started the cluster."""
    import ray

    node = ray._private.worker._global_node
    dead = set() if node is None else {kind for kind, _ in node.dead_processes()}
    return next((kind for kind in ("gcs_server", "raylet") if kind in dead), None)


def shut_down(*, serves: bool) -> None:
    """Leaves the cluster, which ends if this process started it. Idempotent.

    Args:
        serves: whether this launcher deployed anything: then Serve ends too, on a joined cluster as well.
    """
    import ray
    from ray import serve
    from ray.exceptions import RayError

    try:
        # Serve would start a cluster to shut down where there is none, and wait for one that is dead.
        if serves and ray.is_initialized() and dead_process() is None:
            with contextlib.suppress(RayError, ConnectionError, TimeoutError):  # of a cluster that is gone
                serve.shutdown()
    finally:
        ray.shutdown()


def _last_line(error: Exception) -> str:
    """Last line of a remote traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
