"""Checks of Ray: which cluster is found, whether it wants a token, and what it has."""

from __future__ import annotations

import os
from collections.abc import Iterator

from twinkle_serve.cli import checks
from twinkle_serve.cli.checks import Check
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.placement import NodeResources


def ray_checks(address: str | None) -> Iterator[Check]:
    """Checks the cluster of an address, else of RAY_ADDRESS, else of this machine.

    Joins it only if it was named.
    """
    from twinkle_serve.remote.clusters import find_cluster, token_source

    try:
        found = find_cluster(address)
    except TwinkleServeError as error:
        yield Check("Ray cluster", "failed", str(error), "Name one with --address.")
        return
    if found is None:
        yield Check("Ray cluster", "note", "none runs here: `twinkle-serve up` starts one")
        yield checks.port("Ray dashboard", "127.0.0.1", checks.DASHBOARD_PORT)
    else:
        yield Check("Ray cluster", "ok", f"{found.address} ({found.source})")
    token = token_source()
    mode = os.environ.get("RAY_AUTH_MODE", "")
    text = f"found at {token}" if token else "none in RAY_AUTH_TOKEN, at RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token"
    yield Check("Ray token", "ok" if token else "note", text + (f"; RAY_AUTH_MODE={mode}" if mode else ""))
    if found is None or not named(address):
        return
    try:
        nodes = cluster_nodes(address)
    except TwinkleServeError as error:
        yield Check("joining it", "failed", str(error), "See the Ray token above.")
        return
    shown = "; ".join(f"{node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes)
    needs = "with the token" if token else "without a token"
    yield Check("joining it", "ok", f"{needs}, {len(nodes)} nodes: {shown}")


def named(address: str | None) -> bool:
    """Whether a cluster is named, instead of one on this machine that is found by itself."""
    return bool(address or os.environ.get("RAY_ADDRESS"))


def cluster_nodes(address: str | None) -> list[NodeResources]:
    """Returns the resources of each node of the named cluster; of this machine, where none is named.

    Raises:
        ServiceNotReadyError: it cannot be joined.
    """
    if not named(address):
        return [NodeResources(cpus=float(len(os.sched_getaffinity(0))), gpus=float(len(checks.gpu_memory())))]
    from twinkle_serve.remote.clusters import find_cluster, join_cluster, living_nodes

    found = find_cluster(address)
    assert found is not None
    join_cluster(found)
    return living_nodes()
