"""The Ray cluster and the Serve instance of a launcher."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle_serve.errors import ConfigError, ServiceNotReadyError, TwinkleServeError
from twinkle_serve.gateway.config import GatewayArgs

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema


LOOPBACK = "127.0.0.1"
GATEWAY_BUILDER = "graphs.gateway:build"


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


def join_or_start(applications: Collection[str], *, replace: bool = False) -> Cluster:
    """Joins the cluster of RAY_ADDRESS, or starts one that ends with this process.

    Args:
        replace: replace applications of these names even if another job or `serve` deployed them.

    Raises:
        ConfigError: the cluster serves applications other than these.
        NotOwnerError: another running job, or `serve`, has deployed an application of one of these names.
        LaunchError: there is no cluster at RAY_ADDRESS, or Ray did not start.
    """
    import ray
    from ray.exceptions import RayError

    from twinkle_serve.remote.clusters import LOCAL, find_cluster, join_cluster, start_cluster

    address = os.environ.get("RAY_ADDRESS") or LOCAL
    joined = address != LOCAL
    try:
        if not joined:
            start_cluster()
        elif (found := find_cluster()) is not None:
            join_cluster(found, log_to_driver=True)
        else:
            raise LaunchError(f"no Ray cluster runs here (RAY_ADDRESS={address}). Start it, or unset RAY_ADDRESS.")
    except ServiceNotReadyError as error:
        raise LaunchError(str(error)) from error
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise LaunchError(f"Ray did not start: {error}") from error
    if joined:
        _require_room_for(applications, replace)
    return Cluster(
        address=str(ray.get_runtime_context().gcs_address),
        dashboard_url=str(ray._private.worker.get_dashboard_url() or ""),
        joined=joined,
        needs_token=os.environ.get("RAY_AUTH_MODE") == "token",
    )


def _require_room_for(applications: Collection[str], replace: bool) -> None:
    """Refuses to delete or replace applications of others, as deploying a config would."""
    from ray import serve

    from twinkle_serve.remote.applications import require_own

    present = set(serve.status().applications)
    if others := present - set(applications):
        raise ConfigError(
            f"the cluster also serves {', '.join(sorted(others))}, and deploying this config would delete every "
            "application that is not in it. Add them to the config, or unset RAY_ADDRESS to start a new cluster."
        )
    for name in () if replace else sorted(present & set(applications)):
        require_own(name, "replaced", "Change it by `serve deploy`, or replace it with --replace.")


def start_serve(schema: ServeDeploySchema) -> bool:
    """Starts Serve as `serve run` does; one that runs already stays as it is. Returns whether it started it.

    Raises:
        LaunchError: it did not start; its HTTP port may be in use.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import gRPCOptions
    from ray.serve.context import _get_global_client

    try:
        runs = _get_global_client(raise_if_no_controller_running=False) is not None
        serve.start(
            proxy_location=schema.proxy_location,
            http_options={**schema.http_options.model_dump(), "host": http_host(schema)},
            grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
            controller_options=schema.controller_options,
        )
    except (RayError, RuntimeError, TimeoutError, ValueError) as error:
        remedy = " Set http_options.port to a free one." if "bind" in str(error) else ""
        raise LaunchError(f"Serve did not start: {_last_line(error)}{remedy}") from error
    return not runs


def http_host(schema: ServeDeploySchema) -> str:
    """Returns where HTTP listens: on this machine only, unless the config says otherwise. Ray Serve's own default is
    every interface."""
    given = "host" in schema.http_options.model_fields_set
    return str(schema.http_options.host) if given else LOOPBACK


def gateway_urls(schema: ServeDeploySchema) -> list[str]:
    """Returns where the gateways of a config answer, without a slash at the end: at their own address if they have one,
    else at that of Serve's proxy."""
    http = schema.http_options
    proxy = _url(http_host(schema), http.port) + (http.root_path or "").rstrip("/")
    urls = []
    for application in schema.applications:
        if application.import_path != GATEWAY_BUILDER:
            continue
        listen = GatewayArgs.model_validate(application.args).listen
        if listen is not None:
            urls.append(_url(listen.host, listen.port))
        elif application.route_prefix is not None:
            urls.append(proxy + application.route_prefix.rstrip("/"))
    return urls


def _url(host: str, port: int) -> str:
    """Returns a URL at which this machine reaches a server that listens at a host and port."""
    shown = LOOPBACK if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


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


def shut_down(applications: Collection[str], *, ends_serve: bool) -> None:
    """Ends the applications that this launcher has deployed, and leaves the cluster, which ends if this process started
    it. Idempotent.

    Args:
        ends_serve: whether this launcher has started Serve: it ends too, unless others have applications there.
    """
    import ray
    from ray import serve
    from ray.exceptions import RayError

    try:
        # Serve would start a cluster to shut down where there is none, and wait for one that is dead.
        if (applications or ends_serve) and ray.is_initialized() and dead_process() is None:
            with contextlib.suppress(RayError, ConnectionError, TimeoutError):  # of a cluster that is gone
                own, others = _divided(applications)
                if ends_serve and not others:
                    serve.shutdown()
                for name in () if ends_serve and not others else own:
                    serve.delete(name)
    finally:
        ray.shutdown()


def _divided(deployed: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns the applications that this launcher has deployed, and those of others, who may have replaced one."""
    from ray import serve

    from twinkle_serve.remote.applications import owner_of

    present = sorted(serve.status().applications)
    own = [name for name in present if name in deployed and (owner := owner_of(name)) is not None and owner.job is None]
    return own, [name for name in present if name not in own]


def _last_line(error: Exception) -> str:
    """Last line of a remote traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
