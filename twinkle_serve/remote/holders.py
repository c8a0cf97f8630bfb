"""Actors that reserve a GPU, or cores, in Ray, and the nodes with devices."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ray
from ray._private.state import available_resources_per_node
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from twinkle_serve.errors import MeshError
from twinkle_serve.placement import Device, cpus_held

GRACE_S = 3.0
"""Ray counts the devices of a dead process as free only after a while; a reservation waits this long for them."""

HOLDERS_START_S = 60.0
"""A holder that has not started by then did not get its device."""


@dataclass(frozen=True)
class Node:
    """A living node with devices of one type."""

    id: str
    ip: str
    devices: int
    """Number of usable devices."""


class Holder:
    """Actor that reserves a GPU, or cores, in Ray."""

    def ready(self) -> None:
        """Returns as soon as the actor runs."""

    def gpus(self) -> tuple[str, list[str] | None]:
        """Returns the id of its GPU, and the ids of all GPUs of the node if Ray was started with a list of them."""
        # The process's initial environment; Ray has overwritten the variable in os.environ.
        first = dict(line.partition("=")[::2] for line in Path("/proc/self/environ").read_text().split("\0") if line)
        visible = first.get("CUDA_VISIBLE_DEVICES")
        return str(ray.get_gpu_ids()[0]), visible.split(",") if visible else None


class HeldGpu(NamedTuple):
    """A reserved GPU."""

    id: str
    visible: list[str] | None
    """Ids of all GPUs of its node, if Ray was started with a list of them."""
    holder: ActorHandle


def nodes_with(device_type: str, per_node: int | None) -> list[Node]:
    """Returns the living nodes with such devices, the head first, then by address."""
    resource = "GPU" if device_type == "cuda" else "CPU"
    nodes = []
    for node in ray.nodes():
        devices = int(node["Resources"].get(resource, 0)) if node["Alive"] else 0
        if devices >= (per_node or 1):
            head = "node:__internal_head__" in node["Resources"]
            nodes.append((not head, node["NodeManagerAddress"], node["NodeID"], per_node or devices))
    return [Node(id_, ip, devices) for _, ip, id_, devices in sorted(nodes)]


def wait_for(resource: str, needed: float, node_ids: Sequence[str]) -> None:
    """Waits up to GRACE_S until enough devices are free; if some are still missing, the allocation raises."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        available = available_resources_per_node()
        if sum(available.get(node, {}).get(resource, 0.0) for node in node_ids) >= needed:
            return
        time.sleep(0.05)


def take_gpus(nodes: Sequence[Node]) -> list[list[HeldGpu]]:
    """Reserves every free GPU. Returns them by node."""
    available = available_resources_per_node()
    started = [
        (index, _start_holder(node.id, num_gpus=1))
        for index, node in enumerate(nodes)
        for _ in range(int(available.get(node.id, {}).get("GPU", 0.0)))
    ]
    requests = {holder.gpus.remote(): (index, holder) for index, holder in started}
    answered, late = (
        ray.wait(list(requests), num_returns=len(requests), timeout=HOLDERS_START_S) if requests else ([], [])
    )
    kill([requests[ref][1] for ref in late])
    gpus: list[list[HeldGpu]] = [[] for _ in nodes]
    for ref in answered:
        index, holder = requests[ref]
        with contextlib.suppress(RayError):  # the node died with its GPUs
            gpu, visible = ray.get(ref)
            gpus[index].append(HeldGpu(gpu, visible, holder))
    return gpus


def hold_cores(groups: dict[str, tuple[Device, ...]]) -> dict[str, list[ActorHandle]]:
    """Starts holders for each group, one on each node of its devices.

    Raises:
        MeshError: other processes took the cores meanwhile.
    """
    holders: dict[str, list[ActorHandle]] = {}
    for name, devices in groups.items():
        by_node = Counter(device.node_id for device in devices)
        holders[name] = [_start_holder(node, num_cpus=cpus_held(cores)) for node, cores in by_node.items()]
    started = [holder for of_group in holders.values() for holder in of_group]
    try:
        ray.get([holder.ready.remote() for holder in started], timeout=HOLDERS_START_S)
    except RayError as error:
        kill(started)
        raise MeshError(
            f"{sum(map(len, groups.values()))} cores were free but could not be reserved within {HOLDERS_START_S:g} s. "
            "Other processes took them, or a node is too busy to start a process."
        ) from error
    return holders


def _start_holder(node_id: str, **resources: float) -> ActorHandle:
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": affinity, **resources}
    return ray.remote(Holder).options(**options).remote()


def kill(holders: Sequence[ActorHandle]) -> None:
    """Kills holders; Ray counts their devices as free a moment later."""
    for holder in holders:
        ray.kill(holder)
