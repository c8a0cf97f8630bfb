"""Who has which devices of the cluster: one detached actor that survives the run that started it.

A GPU is held by an actor that asks Ray for it, since only who has it learns its id; the cores of a group on a node by
one actor that asks for as many CPUs. So nothing else that asks Ray for devices gets them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import ray
from ray import serve
from ray._private.state import available_resources_per_node, jobs
from ray.exceptions import RayError

from twinkle_serve.errors import MeshError
from twinkle_serve.mesh import DeviceGroup
from twinkle_serve.placement import SIDE_CPUS, Device, GroupDevices, cpus_held
from twinkle_serve.remote.allocation import SOMEBODY, Slot, allocate, check_requests, unit_of
from twinkle_serve.remote.holders import (
    GRACE_S,
    HOLDERS_START_S,
    Node,
    hold_cores,
    kill,
    nodes_with,
    take_gpus,
    wait_for,
)

logger = logging.getLogger(__name__)

LEDGER = "twinkle-ledger"
NAMESPACE = "serve"

APPLICATION_ENDS_S = 60.0
"""Serve's own limit for a deletion."""

LEDGER_ANSWERS_S = 2 * (3 * HOLDERS_START_S + 2 * GRACE_S + APPLICATION_ENDS_S)
"""Twice what one call of the ledger waits for: another may be in front of it."""


@dataclass
class _Group:
    request: DeviceGroup
    devices: GroupDevices
    holders: list[Any]
    job: str
    owner: str
    """The process that frees it."""
    applications: set[str] = field(default_factory=set)
    """Of Serve, whose engines are or were here: they outlive the run that deployed them."""


class Ledger:
    """Reserves groups of devices.

    Guarantees: calls run one after another, so two runs never reserve the same device.
    Guarantees: a reservation gives every group its devices, or none; groups that it would replace stay until then.
    Guarantees: no engine of a sampler goes on using devices that its group no longer has.
    Does not guarantee: that a group of cores stays when it is being replaced and something else takes its cores
        meanwhile: Ray cannot swap, so they are given back first.
    Does not guarantee: that a group outlives a node that it has devices of. It is gone then, until a run asks for it.
    """

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._visible: dict[str, list[str]] = {}
        """By node, the GPUs that it was told to use."""

    def reserve(
        self,
        groups: Sequence[DeviceGroup],
        job: str,
        owner: str,
        per_node: dict[str, int | None],
        occupied: Collection[str] = (),
    ) -> list[str]:
        """Reserves the groups; those that stand as asked are kept as they are.

        Groups of other names, whose run is over and in which no application runs, are freed first.

        Args:
            per_node: by device type, how many devices of a node count; nodes with fewer do not. None: all.
            occupied: groups in which the caller has remote objects.

        Returns:
            The groups that `owner` frees: all but those of a run that still lives.
        """
        self._drop_broken()
        self._drop_abandoned({group.name for group in groups})
        nodes = {device_type: nodes_with(device_type, per_node[device_type]) for device_type in ("cpu", "cuda")}
        has_gpus = bool(nodes["cuda"])
        groups = [_resolved(group, has_gpus) for group in groups]
        totals = {device_type: sum(node.devices for node in found) for device_type, found in nodes.items()}
        _require_nodes(groups, totals, per_node)
        check_requests(groups, totals)
        kept = [group for group in groups if group.name in self._groups and self._groups[group.name].request == group]
        new = [group for group in groups if group not in kept]
        for group in new:
            self._require_replaceable(group, job, occupied)
        self._reserve_new(new, nodes, job, owner)
        owned = [group.name for group in new]
        for group in kept:
            standing = self._groups[group.name]
            if not _lives(standing.job):
                standing.job, standing.owner = job, owner
            if standing.owner == owner:
                owned.append(group.name)
        return owned

    def release(self, names: Sequence[str], owner: str) -> None:
        """Frees those of the groups that are the owner's. Applications that run in them end."""
        for name in names:
            if name in self._groups and self._groups[name].owner == owner:
                self._end_applications(self._groups[name])
                kill(self._groups.pop(name).holders)

    def enter(self, name: str, devices: Sequence[Device], application: str) -> bool:
        """An engine of an application is about to use devices of a group.

        Raises:
            MeshError: the group has not got them, or not any more.
        """
        standing = self._groups.get(name)
        if standing is None or not set(devices) <= set(standing.devices.devices):
            raise MeshError(
                f"DeviceGroup {name!r} was freed or replaced since application {application!r} was given its devices. "
                "Reserve the group with initialize('ray', groups=…) and deploy the application anew."
            )
        standing.applications.add(application)
        return True

    def group(self, name: str) -> GroupDevices | None:
        """The devices of a group, if it stands."""
        self._drop_broken()
        standing = self._groups.get(name)
        return standing.devices if standing else None

    def names(self) -> list[str]:
        """The groups that stand."""
        self._drop_broken()
        return list(self._groups)

    def _drop_broken(self) -> None:
        """Frees groups that lost a holder, whose device others can have by now."""
        asked = {holder.ready.remote(): name for name, group in self._groups.items() for holder in group.holders}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=HOLDERS_START_S) if asked else ([], [])
        for ref in answered:
            try:
                ray.get(ref)
            except RayError:
                if asked[ref] in self._groups:
                    kill(self._groups.pop(asked[ref]).holders)

    def _drop_abandoned(self, asked: Collection[str]) -> None:
        for name, group in list(self._groups.items()):
            if name not in asked and not _lives(group.job) and not _running(group):
                logger.warning(f"DeviceGroup {name!r} is freed: its run is over, and no application runs in it")
                kill(self._groups.pop(name).holders)

    def _end_applications(self, group: _Group) -> None:
        """Before others have the devices.

        Raises:
            MeshError: one did not end.
        """
        for application in _running(group):
            logger.warning(f"application {application!r} is deleted: it runs in DeviceGroup {group.request.name!r}")
            try:
                serve.delete(application)
            except TimeoutError as error:
                raise MeshError(
                    f"application {application!r} in DeviceGroup {group.request.name!r} did not end within "
                    f"{APPLICATION_ENDS_S:g} s. See `serve status`."
                ) from error

    def _require_replaceable(self, group: DeviceGroup, job: str, occupied: Collection[str]) -> None:
        standing = self._groups.get(group.name)
        if standing is None:
            return
        if standing.job == job:
            runs = [f"application {name!r}" for name in _running(standing)]
            if runs := [*runs, *["remote objects"] * (group.name in occupied)]:
                raise MeshError(
                    f"DeviceGroup {group.name!r} has ranks={standing.request.ranks} of {standing.devices.device_type}, "
                    f"this asks for ranks={group.ranks} of {group.device_type}, and {' and '.join(runs)} of this run "
                    "are in it. End them first, a sampler with its shutdown(), or keep the group as it is."
                )
        elif _lives(standing.job):
            raise MeshError(
                f"DeviceGroup {group.name!r} is reserved by a run that still lives, with "
                f"ranks={standing.request.ranks} of {standing.devices.device_type}; this run asks for "
                f"ranks={group.ranks} of {group.device_type}. Give the group another name, or end the other run."
            )

    def _reserve_new(self, new: list[DeviceGroup], nodes: dict[str, list[Node]], job: str, owner: str) -> None:
        replaced = [self._groups[group.name] for group in new if group.name in self._groups]
        cuda = [group for group in new if group.device_type == "cuda"]
        cpu = [group for group in new if group.device_type == "cpu"]
        pool: dict[Device, Any] = {}
        try:
            gpus = self._gpus(cuda, nodes["cuda"], replaced, pool) if cuda else {}
            cores = self._cores(cpu, nodes["cpu"], replaced) if cpu else {}
            for old in replaced:  # of runs that are over, or nothing runs in them
                self._end_applications(old)
            if cores:
                # Ray cannot swap: what replaced groups hold is given back first.
                for old in replaced:
                    if old.devices.device_type == "cpu":
                        kill(old.holders)
                        self._groups.pop(old.request.name)
            holders = hold_cores(cores)
        except BaseException:
            kill(list(pool.values()))
            raise
        for old in replaced:
            self._groups.pop(old.request.name, None)
            if old.devices.device_type == "cpu":
                kill(old.holders)
            else:
                pool.update(zip(old.devices.devices, old.holders, strict=True))
        for group in new:
            devices = gpus[group.name] if group.device_type == "cuda" else cores[group.name]
            mine = holders.get(group.name) or [pool.pop(device) for device in devices]
            shape = GroupDevices(group.name, cast(Any, group.device_type), devices, group.gpus_per_worker)
            self._groups[group.name] = _Group(group, shape, mine, job, owner)
        kill(list(pool.values()))

    def _gpus(
        self, groups: list[DeviceGroup], nodes: list[Node], replaced: list[_Group], pool: dict[Device, Any]
    ) -> dict[str, tuple[Device, ...]]:
        """Takes every GPU that is free into `pool`, and chooses."""
        given_back = {d for group in replaced if group.devices.device_type == "cuda" for d in group.devices.devices}
        needed = sum(group.world_size for group in groups) - len(given_back)
        wait_for("GPU", needed, [node.id for node in nodes])
        slots: list[Slot] = []
        for node, found in zip(nodes, take_gpus(nodes), strict=True):
            for _, visible, _ in found:
                if visible:
                    self._visible[node.id] = visible
            # Ray numbers them from 0 where it was not told which to use.
            ids = self._visible.get(node.id, [str(i) for i in range(node.devices)])
            free = {gpu: holder for gpu, _, holder in found}
            for id_ in ids[: node.devices]:
                device = Device(node.id, node.ip, id_)
                if id_ in free:
                    pool[device] = free.pop(id_)
                has = device in pool or device in given_back
                slots.append(Slot(device, None if has else self._holder_of("cuda", device)))
            kill(list(free.values()))
        return allocate(groups, slots, unit_of("cuda"))

    def _cores(
        self, groups: list[DeviceGroup], nodes: list[Node], replaced: list[_Group]
    ) -> dict[str, tuple[Device, ...]]:
        back = [group for group in replaced if group.devices.device_type == "cpu"]
        needed = sum(cpus_held(group.world_size) for group in groups)
        returning = {node.id: 0.0 for node in nodes}
        for group in back:
            for node_id, devices in group.devices.nodes.items():
                if node_id in returning:
                    returning[node_id] += cpus_held(len(devices))
        wait_for("CPU", needed - sum(returning.values()), [node.id for node in nodes])
        available = available_resources_per_node()
        budgets = {
            node.id: int(available.get(node.id, {}).get("CPU", 0.0) + returning[node.id] + 2 * SIDE_CPUS + 1e-6)
            for node in nodes
        }
        given_back = {device for group in back for device in group.devices.devices}
        slots = []
        for node in nodes:
            for core in range(node.devices):
                device = Device(node.id, node.ip, str(core))
                slots.append(Slot(device, None if device in given_back else self._holder_of("cpu", device, None)))
        return allocate(groups, slots, unit_of("cpu"), budgets)

    def _holder_of(self, device_type: str, device: Device, otherwise: str | None = SOMEBODY) -> str | None:
        for name, group in self._groups.items():
            if group.devices.device_type == device_type and device in group.devices.devices:
                return f"group {name!r}"
        return otherwise


def ledger(*, create: bool = False) -> Any:
    """The cluster's ledger; None where no run has started one.

    On the head node: whoever has it there has it as long as the cluster lives.
    """
    if not create:
        with contextlib.suppress(ValueError):
            return ray.get_actor(LEDGER, namespace=NAMESPACE)
        return None
    return (
        ray.remote(Ledger)
        .options(
            name=LEDGER,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=0,
            resources={"node:__internal_head__": 0.001},
        )
        .remote()
    )


def _resolved(group: DeviceGroup, has_gpus: bool) -> DeviceGroup:
    if group.device_type != "auto":
        return group
    return replace(group, device_type="cuda" if has_gpus else "cpu")


def _require_nodes(groups: Sequence[DeviceGroup], totals: dict[str, int], per_node: dict[str, int | None]) -> None:
    arguments = {"cpu": "ncpu_proc_per_node", "cuda": "nproc_per_node"}
    for device_type, argument in arguments.items():
        wanted = per_node[device_type]
        if wanted and not totals[device_type] and any(group.device_type == device_type for group in groups):
            most = max((node.devices for node in nodes_with(device_type, None)), default=0)
            raise MeshError(
                f"{argument}={wanted}, and no node of the cluster has more than {most} {unit_of(device_type)}. "
                f"Lower {argument} or leave it out."
            )


def _running(group: _Group) -> list[str]:
    """Applications of a group that there still are."""
    return sorted(group.applications & serve.status().applications.keys())


def _lives(job: str) -> bool:
    return any(entry["JobID"] == job and not entry["IsDead"] for entry in jobs())
