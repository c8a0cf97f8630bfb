"""Assigns devices to engines: plain arithmetic over the resources of the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from twinkle_serve.errors import MeshError
from twinkle_serve.mesh import DeviceMesh

DeviceKind: TypeAlias = Literal["cpu", "cuda"]

SIDE_CPUS = 0.1
"""CPUs that a deployment with little computation requests from Ray, so that router and engines fit on two cores."""

GPU_ENGINE_CPUS = 1.0
"""CPUs that an engine on GPUs requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """Total resources of one node, used or not."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU or one core of a node."""

    node_id: str
    """Ray's id of the node."""
    node_ip: str
    """Address of the node."""
    id: str
    """Of a GPU, its id in CUDA_VISIBLE_DEVICES; of a core, its index among the cores that Ray's processes may use."""

    @property
    def resource(self) -> str:
        """Name of the Ray resource that only this node has."""
        return f"node:{self.node_ip}"


@dataclass(frozen=True, slots=True)
class GroupDevices:
    """The devices of a reserved DeviceGroup."""

    name: str
    """Name of the group."""
    device_type: DeviceKind
    """cpu or cuda; auto is resolved."""
    devices: tuple[Device, ...]
    """In the order of the group's ranks."""
    gpus_per_worker: int = 1
    """Devices of each worker of a remote class."""

    @property
    def nodes(self) -> dict[str, tuple[Device, ...]]:
        """The devices by the id of their node, in the order in which nodes first appear in `devices`."""
        by_node: dict[str, list[Device]] = {}
        for device in self.devices:
            by_node.setdefault(device.node_id, []).append(device)
        return {node: tuple(devices) for node, devices in by_node.items()}

    @property
    def unit(self) -> str:
        """Word for its devices in messages."""
        return "GPUs" if self.device_type == "cuda" else "cores"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Resources of the engines of a mesh."""

    device: DeviceKind
    """Device type of the engines."""
    executor: Literal["mp", "ray"]
    """vLLM's executor for a replica: mp within one node, ray in a placement group over several."""
    num_cpus: float
    """CPUs that each engine's actor requests from Ray."""
    num_gpus: int
    """GPUs that each engine's actor requests; 0 if a placement group holds them."""
    bundles: tuple[dict[str, float], ...] = ()
    """Placement group of each engine, the actor's own bundle first; empty if it needs none."""
    devices_per_node: int = 1
    """On CPU, devices of the mesh, or of its group, that share the cores and the memory of a node."""
    group: str | None = None
    """The DeviceGroup whose holder actors have the devices reserved in Ray, so that engines request none."""
    engines: tuple[tuple[Device, ...], ...] = ()
    """In a group, the devices of each engine by dp rank, all on one node. An engine sees only these."""


def place(mesh: DeviceMesh, nodes: Sequence[NodeResources]) -> Placement:
    """Assigns devices of the cluster to every engine of the mesh. On CPU a device is a core or more.

    An engine on CPU requests one core per device, minus the share of router and store, so that a full mesh fits.

    Raises:
        MeshError: the mesh does not fit the cluster.
    """
    gpus = sum(node.gpus for node in nodes)
    cpus = sum(node.cpus for node in nodes)
    device: DeviceKind = "cuda" if mesh.device_type == "cuda" else "cpu"
    if mesh.device_type == "auto" and gpus:
        device = "cuda"
    have, unit = (gpus, "GPUs") if device == "cuda" else (cpus, "CPUs")
    if mesh.world_size > have:
        raise MeshError(
            f"device_mesh needs {mesh.world_size} {unit} ({_dimensions(mesh)}), the cluster has {have:g}. "
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


def place_in_group(mesh: DeviceMesh, group: GroupDevices) -> Placement:
    """Assigns devices of the group, and no others, to every engine of the mesh.

    An engine gets neighbouring devices of one node. If the mesh is smaller than the group, its last devices stay idle.

    Raises:
        MeshError: the mesh is larger than the group, or of another device type or worker size, or an engine would have
            to span nodes.
    """
    where = f"group {group.name!r}"
    if mesh.device_type not in ("auto", group.device_type):
        raise MeshError(
            f"device_mesh.device_type is {mesh.device_type}, {where} has {group.device_type} devices. "
            "Leave device_mesh.device_type out, or name another group."
        )
    if mesh.world_size > len(group.devices):
        raise MeshError(
            f"device_mesh needs {mesh.world_size} devices ({_dimensions(mesh)}), {where} has {len(group.devices)}. "
            "Lower device_mesh.dp_size or device_mesh.tp_size, or give the group more ranks."
        )
    per_replica = mesh.devices_per_replica
    if group.gpus_per_worker not in (1, per_replica):
        raise MeshError(
            f"{where} has gpus_per_worker={group.gpus_per_worker}, an engine of device_mesh spans {per_replica} "
            f"devices ({_dimensions(mesh)}). Set gpus_per_worker to {per_replica} or leave it out."
        )
    engines = [
        devices[start : start + per_replica]
        for devices in group.nodes.values()
        for start in range(0, len(devices) - per_replica + 1, per_replica)
    ]
    if len(engines) < mesh.dp_size:
        on_nodes = ", ".join(str(len(devices)) for devices in group.nodes.values())
        raise MeshError(
            f"device_mesh needs {mesh.dp_size} engines of {per_replica} devices, each on one node; {where} has "
            f"{on_nodes} devices on its nodes: room for {len(engines)}. An engine in a group cannot span nodes. "
            f"Lower device_mesh.tp_size or device_mesh.pp_size, or list ranks that share a node."
        )
    return Placement(
        device=group.device_type,
        executor="mp",
        num_cpus=0.0,
        num_gpus=0,
        devices_per_node=max(map(len, group.nodes.values())),
        group=group.name,
        engines=tuple(engines[: mesh.dp_size]),
    )


def cores_of_devices(devices: Sequence[Device], cores: Sequence[int]) -> list[tuple[int, ...]]:
    """The core of each device of a CPU group.

    Args:
        devices: devices of one node.
        cores: ids of the node's cores that this process may use. If Ray counts more than these, devices share them.
    """
    return [(cores[int(device.id) % len(cores)],) for device in devices]


def cpus_held(cores: int) -> float:
    """CPUs that a group's cores on a node reserve in Ray; router and store fit beside a group of all cores."""
    return cores - 2 * SIDE_CPUS


def _dimensions(mesh: DeviceMesh) -> str:
    sizes = (("dp_size", mesh.dp_size), ("tp_size", mesh.tp_size), ("pp_size", mesh.pp_size))
    return " x ".join(f"{name}={size}" for name, size in sizes if size > 1 or name != "pp_size")


def _require_cpus(engines: int, cpus_each: float, node_cpus: Sequence[float]) -> None:
    """Refuses engines that Ray would wait forever to place: each is one actor on one node."""
    fit = sum(int(cpus / cpus_each) for cpus in node_cpus)
    if fit < engines:
        raise MeshError(
            f"device_mesh needs {engines} engines of {cpus_each:g} CPUs, each on one node; the cluster's nodes have "
            f"{', '.join(f'{cpus:g}' for cpus in node_cpus)}: room for {fit}. "
            "Lower device_mesh.dp_size or device_mesh.tp_size, or start the cluster with more."
        )


def cores_of_engine(
    dp_rank: int, devices_per_replica: int, devices_per_node: int, cores: Sequence[int]
) -> list[tuple[int, ...]]:
    """The cores of each device of an engine, disjoint from those of the other engines on the node.

    A device with two or more cores leaves its last one to the scheduler and the event loop, as vLLM does by default.

    Args:
        dp_rank: the engine's rank.
        devices_per_replica: devices of each engine.
        devices_per_node: devices of all engines on the node.
        cores: ids of the node's cores that this process may use.
    """
    per_device = max(1, len(cores) // devices_per_node)
    shares = []
    for device in range(dp_rank * devices_per_replica, (dp_rank + 1) * devices_per_replica):
        share = tuple(cores[(device * per_device + i) % len(cores)] for i in range(per_device))
        shares.append(share[:-1] if len(share) > 1 else share)
    return shares
