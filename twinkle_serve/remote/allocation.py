"""Allocates devices to groups, given the devices of the cluster and their holders. Free of Ray."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from twinkle_serve.errors import MeshError
from twinkle_serve.mesh import DeviceGroup
from twinkle_serve.placement import Device

OTHER_PROCESS = "another process"


@dataclass(frozen=True, slots=True)
class Slot:
    """A device of the cluster; its index in a list is its rank."""

    device: Device
    holder: str | None = None
    """Name of its holder; None if it is free."""


def check_requests(groups: Sequence[DeviceGroup], totals: dict[str, int]) -> None:
    """Refuses requests that no cluster of this size can satisfy, even if all devices are free.

    Args:
        groups: requests with resolved device types.
        totals: number of devices in the cluster by device type.

    Raises:
        MeshError: a repeated name, a rank that does not exist or is in two groups, or more devices than the cluster
            has.
    """
    names: set[str] = set()
    claims: dict[tuple[str, int], str] = {}
    for group in groups:
        total, unit = totals[group.device_type], unit_of(group.device_type)
        if group.name in names:
            raise MeshError(f"two DeviceGroups have the name {group.name!r}. Give each a unique name.")
        names.add(group.name)
        if group.visible_devices is not None and group.device_type == "cpu":
            raise MeshError(
                f"DeviceGroup {group.name!r}: visible_devices={group.visible_devices!r} chooses GPUs, and the group "
                "has device_type cpu. Leave visible_devices out."
            )
        for rank in group.ranks if isinstance(group.ranks, list) else []:
            if rank >= total:
                raise MeshError(
                    f"DeviceGroup {group.name!r} lists rank {rank}, the cluster has {total} {unit}"
                    f"{f', ranks 0 to {total - 1}' if total else ''}. List ranks that exist."
                )
            other = claims.setdefault((group.device_type, rank), group.name)
            if other != group.name:
                raise MeshError(
                    f"rank {rank} is in two DeviceGroups, {other!r} and {group.name!r}. A device belongs to one group."
                )
    for device_type, total in totals.items():
        requests = [group for group in groups if group.device_type == device_type]
        needed = sum(group.world_size for group in requests)
        if needed > total:
            raise MeshError(
                f"the groups need {needed} {unit_of(device_type)} ({_listed(requests)}), the cluster has {total}. "
                "Lower their ranks, or start the cluster with more."
            )


def allocate(
    groups: Sequence[DeviceGroup], slots: Sequence[Slot], unit: str, budgets: dict[str, int] | None = None
) -> dict[str, tuple[Device, ...]]:
    """Chooses the devices of all groups, or raises.

    Listed ranks are served first. A count takes the first free devices: of one node if one has enough, else worker by
    worker, so that the devices of a worker share a node.

    Args:
        groups: requests of one device type.
        slots: all devices of that type, by rank.
        unit: word for the devices in messages.
        budgets: number of devices by node that can be taken, however many of its slots are free. Ray counts cores
            without naming them, so those used by others are not particular slots.

    Returns:
        Devices of each group by name, in the order of its ranks.

    Raises:
        MeshError: a device is held or not visible to its group, or a worker would have to span nodes.
    """
    free = _Free(slots, budgets)
    taken: dict[str, tuple[Device, ...]] = {}
    for group in sorted(groups, key=lambda group: isinstance(group.ranks, int)):
        if isinstance(group.ranks, list):
            taken[group.name] = tuple(_listed_device(group, rank, slots, free, unit) for rank in group.ranks)
        else:
            taken[group.name] = _counted_devices(group, slots, free, unit)
        _require_workers_on_nodes(group, taken[group.name])
    return taken


class _Free:
    """The devices that are left during an allocation."""

    def __init__(self, slots: Sequence[Slot], budgets: dict[str, int] | None) -> None:
        self.devices = [slot.device for slot in slots if slot.holder is None]
        nodes = {device.node_id for device in self.devices}
        unlimited = len(self.devices)
        self._budgets = {node: unlimited if budgets is None else budgets.get(node, 0) for node in nodes}

    def take(self, device: Device) -> None:
        self.devices.remove(device)
        self._budgets[device.node_id] -= 1

    def has(self, device: Device) -> bool:
        return device in self.devices and self._budgets[device.node_id] > 0

    def by_node(self, visible: Collection[str] | None) -> dict[str, list[Device]]:
        nodes: dict[str, list[Device]] = {}
        for device in self.devices:
            if visible is None or device.id in visible:
                nodes.setdefault(device.node_id, []).append(device)
        return {node: devices[: max(0, self._budgets[node])] for node, devices in nodes.items()}


def _visible(group: DeviceGroup) -> list[str] | None:
    if group.visible_devices is None:
        return None
    return [device.strip() for device in group.visible_devices.split(",") if device.strip()]


def _listed_device(group: DeviceGroup, rank: int, slots: Sequence[Slot], free: _Free, unit: str) -> Device:
    slot = slots[rank]
    what = f"rank {rank} of DeviceGroup {group.name!r} ({unit[:-1]} {slot.device.id} of {slot.device.node_ip})"
    visible = _visible(group)
    if visible is not None and slot.device.id not in visible:
        raise MeshError(f"{what} is not in its visible_devices={group.visible_devices!r}. Remove one of the two.")
    if not free.has(slot.device):
        raise MeshError(f"{what} is held by {slot.holder or OTHER_PROCESS}. List another rank, or free it.")
    free.take(slot.device)
    return slot.device


def _counted_devices(group: DeviceGroup, slots: Sequence[Slot], free: _Free, unit: str) -> tuple[Device, ...]:
    visible = _visible(group)
    nodes = free.by_node(visible)
    per_worker = group.gpus_per_worker
    enough = [node for node in nodes.values() if len(node) >= group.world_size]
    chosen: list[Device] = enough[0][: group.world_size] if enough else []
    if not enough:
        for node in nodes.values():
            whole = min(len(node) // per_worker * per_worker, group.world_size - len(chosen))
            chosen += node[:whole]
    if len(chosen) < group.world_size:
        among = "" if visible is None else f" of visible_devices={group.visible_devices!r}"
        workers = "" if per_worker == 1 else f" in workers of {per_worker}, each on one node"
        left = sum(map(len, nodes.values()))
        raise MeshError(
            f"DeviceGroup {group.name!r} needs {group.world_size} {unit}{among}{workers}, {left} of the cluster's "
            f"{len(slots)} are free{_holders(slots)}. Lower its ranks, or free devices."
        )
    for device in chosen:
        free.take(device)
    return tuple(chosen)


def _require_workers_on_nodes(group: DeviceGroup, devices: Sequence[Device]) -> None:
    for start in range(0, len(devices), group.gpus_per_worker):
        worker = devices[start : start + group.gpus_per_worker]
        if len({device.node_id for device in worker}) > 1:
            raise MeshError(
                f"DeviceGroup {group.name!r}: worker {start // group.gpus_per_worker} with "
                f"gpus_per_worker={group.gpus_per_worker} would span the nodes "
                f"{', '.join(sorted({device.node_ip for device in worker}))}. List ranks that share a node."
            )


def _holders(slots: Sequence[Slot]) -> str:
    counts: dict[str, int] = {}
    for slot in slots:
        if slot.holder:
            counts[slot.holder] = counts.get(slot.holder, 0) + 1
    return f" ({', '.join(f'{count} held by {holder}' for holder, count in counts.items())})" if counts else ""


def unit_of(device_type: str) -> str:
    """Word for the devices of a type in messages."""
    return "GPUs" if device_type == "cuda" else "cores"


def _listed(groups: Sequence[DeviceGroup]) -> str:
    return ", ".join(f"{group.name} {group.world_size}" for group in groups)
