"""Which devices each engine gets. Plain arithmetic over what the cluster says it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from twinkle_serve.errors import MeshError
from twinkle_serve.mesh import DeviceMesh

SIDE_CPUS = 0.1
"""CPUs that a deployment which computes little asks Ray for: router and engines fit two cores together."""

GPU_ENGINE_CPUS = 1.0
"""CPUs that an engine on GPUs asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """What one node of the cluster has in all, used or not."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the engines of a mesh go."""

    device: Literal["cpu", "cuda"]
    executor: Literal["mp", "ray"]
    """vLLM's executor for a replica: mp within one node, ray in a placement group over several."""
    num_cpus: float
    """What each engine's actor asks Ray for."""
    num_gpus: int
    """GPUs of the engine's own actor; 0 where a placement group holds them."""
    bundles: tuple[dict[str, float], ...] = ()
    """Placement group of each engine, the actor's own bundle first; empty where it needs none."""
    devices_per_node: int = 1
    """On CPU, devices of the mesh that share the cores of a node."""


def place(mesh: DeviceMesh, nodes: Sequence[NodeResources]) -> Placement:
    """Devices for every engine of the mesh. On CPU a device is a core or more.

    An engine on CPU asks for a core a device, less what router and store ask for, so that a full mesh fits.

    Raises:
        MeshError: the mesh is larger than the cluster.
    """
    gpus = sum(node.gpus for node in nodes)
    cpus = sum(node.cpus for node in nodes)
    device: Literal["cpu", "cuda"] = "cuda" if mesh.device_type == "cuda" else "cpu"
    if mesh.device_type == "auto" and gpus:
        device = "cuda"
    have, unit = (gpus, "GPUs") if device == "cuda" else (cpus, "CPUs")
    if mesh.world_size > have:
        dims = " x ".join(
            f"{name}={size}"
            for name, size in (("dp_size", mesh.dp_size), ("tp_size", mesh.tp_size), ("pp_size", mesh.pp_size))
            if size > 1 or name != "pp_size"
        )
        raise MeshError(
            f"device_mesh needs {mesh.world_size} {unit} ({dims}), the cluster has {have:g}. "
            "Lower device_mesh.dp_size or device_mesh.tp_size, or start the cluster with more."
        )
    per_replica = mesh.devices_per_replica
    if device == "cpu":
        num_cpus = per_replica - 2 * SIDE_CPUS
        _require_cpus(mesh.dp_size, num_cpus, [node.cpus for node in nodes])
        per_node = -(-mesh.world_size // len(nodes))
        return Placement(device="cpu", executor="mp", num_cpus=num_cpus, num_gpus=0, devices_per_node=per_node)
    if sum(int(node.gpus) // per_replica for node in nodes) >= mesh.dp_size:
        _require_cpus(mesh.dp_size, GPU_ENGINE_CPUS, [node.cpus for node in nodes if node.gpus])
        return Placement(device="cuda", executor="mp", num_cpus=GPU_ENGINE_CPUS, num_gpus=per_replica)
    bundles = ({"CPU": GPU_ENGINE_CPUS}, *({"GPU": 1.0},) * per_replica)
    _require_cpus(mesh.dp_size, GPU_ENGINE_CPUS, [node.cpus for node in nodes])
    return Placement(device="cuda", executor="ray", num_cpus=GPU_ENGINE_CPUS, num_gpus=0, bundles=bundles)


def _require_cpus(engines: int, cpus_each: float, node_cpus: Sequence[float]) -> None:
    """Refuses engines that Ray would wait for ever to place: each is one actor on one node."""
    fit = sum(int(cpus / cpus_each) for cpus in node_cpus)
    if fit < engines:
        raise MeshError(
            f"device_mesh needs {engines} engines of {cpus_each:g} CPUs on a node each, the cluster's nodes have "
            f"{', '.join(f'{cpus:g}' for cpus in node_cpus)}: room for {fit}. "
            "Lower device_mesh.dp_size or device_mesh.tp_size, or start the cluster with more."
        )


def cores_of_engine(
    dp_rank: int, devices_per_replica: int, devices_per_node: int, cores: Sequence[int]
) -> list[tuple[int, ...]]:
    """The cores of each device of an engine, apart from those of every other engine on the node.

    A device with two cores or more leaves its last one to the processes around the computing threads, as vLLM does by
    itself: the scheduler and the event loop need one too.

    Args:
        cores: ids of the cores of the node that this process may use.
    """
    per_device = max(1, len(cores) // devices_per_node)
    mine = []
    for device in range(dp_rank * devices_per_replica, (dp_rank + 1) * devices_per_replica):
        share = tuple(cores[(device * per_device + i) % len(cores)] for i in range(per_device))
        mine.append(share[:-1] if len(share) > 1 else share)
    return mine
