"""Which Ray cluster this process joins, and with which token."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private.authentication import authentication_token_setup as token_setup
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled
from ray.exceptions import RayError

from twinkle_serve.errors import ServiceNotReadyError
from twinkle_serve.placement import NodeResources

logger = logging.getLogger(__name__)

LISTENS_S = 10.0
"""How long an address may take to accept a connection, and to answer."""
SETTINGS = b"\x04"
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + SETTINGS + b"\0" * 5
"""Begins a gRPC connection, as RFC 9113 has it: the preface and a frame of settings. The server sends its own."""

AUTO = "auto"
LOCAL = "local"
"""Ray's word for a new cluster."""
NICENESS = "RAY_worker_niceness"
"""Environment variable of Ray: the niceness of a node's workers, 15 unless it is set."""


@dataclass(frozen=True, slots=True)
class Found:
    """A cluster to join."""

    address: str
    """host:port."""
    source: str
    """Where the address is from, for messages."""


def find_cluster(address: str | None = None) -> Found | None:
    """Returns the cluster of `address`, else of RAY_ADDRESS, else the one that was started with this RAY_TMPDIR, else,
    where RAY_TMPDIR is not set, the only one on this machine; None if there is none.

    Raises:
        ServiceNotReadyError: several clusters, or an invalid address.
    """
    if named := address or os.environ.get("RAY_ADDRESS"):
        source = f"address={named}" if address else f"RAY_ADDRESS={named}"
        return _of_this_machine(source) if named == AUTO else Found(named, source)
    if directory := os.environ.get("RAY_TMPDIR"):
        return _of_directory(directory)
    return _of_this_machine("this machine")


def join_cluster(found: Found, *, log_to_driver: bool = False) -> None:
    """Joins a cluster, with the token that Ray keeps on this machine or finds in the environment.

    Raises:
        ServiceNotReadyError: there is none, or it does not accept this process.
    """
    require_listener(found)
    token: str | None = None
    try:
        token = use_token()
        ray.init(found.address, namespace="serve", log_to_driver=log_to_driver, logging_level="warning")
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise ServiceNotReadyError(
            f"cannot join the Ray cluster at {found.address} ({found.source}): {error}. {_missing(token)}"
        ) from error
    logger.info("joined the Ray cluster at %s (%s)", found.address, found.source)


def living_nodes() -> list[NodeResources]:
    """Returns the resources of each living node of the cluster that this process is in."""
    return [
        NodeResources(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def start_cluster(**options: Any) -> None:
    """Starts a cluster on this machine that ends with this process.

    Its workers, and so the engines, have the priority of other processes, where Ray would put them last.

    Args:
        options: of `ray.init`.
    """
    os.environ.setdefault(NICENESS, "0")
    ray.init(address=LOCAL, namespace="serve", **options)


def is_at(address: str) -> bool:
    """Whether this process is in the cluster at an address. It has to be in one.

    Raises:
        ServiceNotReadyError: an invalid address.
    """
    try:
        here = services.canonicalize_bootstrap_address(address)
    except (ValueError, OSError) as error:
        raise ServiceNotReadyError(f"address={address} is not host:port.") from error
    return here is None or here == ray.get_runtime_context().gcs_address  # None: Ray's word for any


def use_token() -> str | None:
    """Makes Ray use the token that it has, unless RAY_AUTH_MODE says otherwise. Returns where the token is, or None.

    Ray does not look for it where it is given an address.
    """
    notices = logging.getLogger(token_setup.__name__)  # meant for whoever starts a cluster
    level = notices.level
    notices.setLevel(logging.ERROR)
    try:
        used = token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    finally:
        notices.setLevel(level)
    return token_source() if used else None


def token_source() -> str | None:
    """Returns where Ray finds its token in this process; None if nowhere."""
    if not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        return None
    if "RAY_AUTH_TOKEN" in os.environ:
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")


def require_listener(found: Found) -> None:
    """Refuses an address where nothing listens, or something other than Ray: Ray would go on trying for minutes.

    Raises:
        ServiceNotReadyError
    """
    host, _, port = found.address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ServiceNotReadyError(f"{found.source} is not host:port.")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), LISTENS_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                connection.sendall(HELLO)
                answer = connection.recv(9)
                if answer[3:4] != SETTINGS:
                    raise OSError("something other than Ray listens there")
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServiceNotReadyError(f"no Ray cluster at {found.source}: {reason}. Start it, or name another.") from error


def serve_command(arguments: str) -> str:
    """Returns a command line of `serve` for the cluster of this process, which works where it is pasted."""
    url = ""
    with contextlib.suppress(Exception):  # a process in no cluster, or in one behind a Ray client
        url = str(ray._private.worker.get_dashboard_url() or "")
    if not url:
        return f"`serve {arguments}`, which needs Ray's dashboard"
    mode = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    url = url if "://" in url else f"http://{url}"
    return f"`{mode}RAY_DASHBOARD_ADDRESS={url} {Path(sys.executable).with_name('serve')} {arguments}`"


def _missing(token: str | None) -> str:
    if token is not None:
        return (
            f"This process has shown the token of {token}, which the cluster may not accept. Use that of its machine."
        )
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return "It may want a token, and RAY_AUTH_MODE is not token. Unset RAY_AUTH_MODE."
    return (
        "It may want a token, and there is none in RAY_AUTH_TOKEN, at RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token. "
        "`ray get-auth-token` prints it on the cluster's machine, for the user who started it."
    )


def _of_this_machine(source: str) -> Found | None:
    running = {address for address, _ in _raylets()}
    recorded = services.find_bootstrap_address(None)  # of the last `ray start`
    return Found(recorded, source) if recorded in running else _only(running, source)


def _of_directory(directory: str) -> Found | None:
    own = {Path(directory).resolve(), Path(directory, "ray").resolve()}
    return _only({address for address, temp_dir in _raylets() if temp_dir in own}, f"RAY_TMPDIR={directory}")


def _raylets() -> Iterator[tuple[str, Path]]:
    """Yields the cluster's address and the directory of each Ray node on this machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended, or is hidden
            continue
        if Path(command[0]).name == "raylet":
            flags = dict(argument.split("=", 1) for argument in command[1:] if "=" in argument)
            yield flags["--gcs-address"], Path(flags["--temp_dir"]).resolve()


def _only(addresses: set[str], source: str) -> Found | None:
    """
    Raises:
        ServiceNotReadyError: several.
    """
    if len(addresses) > 1:
        raise ServiceNotReadyError(
            f"several Ray clusters run here ({source}): {', '.join(sorted(addresses))}. Set RAY_ADDRESS to one."
        )
    return Found(next(iter(addresses)), source) if addresses else None
