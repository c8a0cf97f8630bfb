"""The cluster's ledger of device groups: one detached actor that survives the run that started it.

A GPU is held by an actor that requests it from Ray, since only that actor learns the GPU's id; a group's cores on a
node are held by one actor that requests as many CPUs. So no other process gets these devices from Ray.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import ray
from ray import serve
from ray._private.state import available_resources_per_node
from ray.actor import ActorHandle
from ray.exceptions import RayError

from twinkle_serve.errors import MeshError
from twinkle_serve.mesh import DeviceGroup
from twinkle_serve.placement import SIDE_CPUS, Device, DeviceKind, GroupDevices, cpus_held
from twinkle_serve.remote.allocation import OTHER_PROCESS, Slot, allocate, check_requests, unit_of
from twinkle_serve.remote.applications import job_runs
from twinkle_serve.remote.clusters import serve_command
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
"""Twice the longest wait of one call: another call may run before it."""


@dataclass
class _Group:
    request: DeviceGroup
    devices: GroupDevices
    holders: list[ActorHandle]
    job: str
    owner: str
    """Token of the process that frees it."""
    applications: set[str] = field(default_factory=set)
    """Serve applications with engines in the group, now or earlier: they outlive the run that deployed them."""


class Ledger:
    """Reserves groups of devices.

    Guarantees:
        - Calls run one after another, so two runs never reserve the same device.
        - A reservation succeeds for all groups or for none; groups that it replaces stay until it succeeds.
        - No engine of a sampler keeps using devices that its group no longer has.

    Does not guarantee:
        - That a group of cores survives its replacement if another process takes its cores meanwhile: Ray cannot swap
          resources, so they are released first.
        - That a group survives the death of a node of its devices. It is gone until a run reserves it again.
    """

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._visible: dict[str, list[str]] = {}
        """GPU ids by node, if Ray was started with a list of them."""

    def reserve(
        self,
        groups: Sequence[DeviceGroup],
        job: str,
        owner: str,
        per_node: dict[str, int | None],
        occupied: Collection[str] = (),
    ) -> list[str]:
        """Reserves groups; existing groups of the same shape are kept.

        Groups with other names, whose run has ended and in which no application runs, are freed first.

        Args:
            groups: the requests.
            job: Ray's id of the caller's job.
            owner: token of the caller's process.
            per_node: number of usable devices of a node, by device type; nodes with fewer are not used. None: all.
            occupied: groups in which the caller has remote objects.

        Returns:
            The groups that `owner` frees, which are all but those of another running job.

        Raises:
            MeshError: the groups cannot be reserved, or an existing one cannot be replaced.
        """
        self._drop_broken()
        self._drop_abandoned({group.name for group in groups})
        nodes = {device_type: nodes_with(device_type, per_node[device_type]) for device_type in ("cpu", "cuda")}
        has_gpus = bool(nodes["cuda"])
        groups = [_resolved(group, has_gpus) for group in groups]
        totals = {device_type: sum(node.devices for node in of_type) for device_type, of_type in nodes.items()}
        _require_nodes(groups, totals, per_node)
        check_requests(groups, totals)
        kept = [group for group in groups if group.name in self._groups and self._groups[group.name].request == group]
        new = [group for group in groups if group not in kept]
        for group in new:
            self._require_replaceable(group, job, occupied)
        self._reserve_new(new, nodes, job, owner)
        owned = [group.name for group in new]
        for group in kept:
            existing = self._groups[group.name]
            if not job_runs(existing.job):
                existing.job, existing.owner = job, owner
            if existing.owner == owner:
                owned.append(group.name)
        return owned

    def release(self, names: Sequence[str], owner: str) -> None:
        """Frees the groups that belong to the owner. Applications that run in them are deleted.

        Raises:
            MeshError: an application could not be deleted in time.
        """
        for name in names:
            if name in self._groups and self._groups[name].owner == owner:
                self._end_applications(self._groups[name])
                kill(self._groups.pop(name).holders)

    def enter(self, name: str, devices: Sequence[Device], application: str) -> bool:
        """Records that an engine of an application is about to use devices of a group.

        Raises:
            MeshError: the group does not have these devices, or no longer has them.
        """
        existing = self._groups.get(name)
        if existing is None or not set(devices) <= set(existing.devices.devices):
            raise MeshError(
                f"DeviceGroup {name!r} was freed or replaced after application {application!r} got its devices. "
                "Reserve the group with initialize('ray', groups=…) and deploy the application again."
            )
        existing.applications.add(application)
        return True

    def group(self, name: str) -> GroupDevices | None:
        """Returns the devices of a group; None if it is not reserved."""
        self._drop_broken()
        existing = self._groups.get(name)
        return existing.devices if existing else None

    def names(self) -> list[str]:
        """Returns the names of the reserved groups."""
        self._drop_broken()
        return list(self._groups)

    def _drop_broken(self) -> None:
        """Frees groups that lost a holder, since others may have its device by now."""
        group_of = {holder.ready.remote(): name for name, group in self._groups.items() for holder in group.holders}
        answered, _ = (
            ray.wait(list(group_of), num_returns=len(group_of), timeout=HOLDERS_START_S) if group_of else ([], [])
        )
        for ref in answered:
            try:
                ray.get(ref)
            except RayError:
                if group_of[ref] in self._groups:
                    kill(self._groups.pop(group_of[ref]).holders)

    def _drop_abandoned(self, requested: Collection[str]) -> None:
        for name, group in list(self._groups.items()):
            if name not in requested and not job_runs(group.job) and not _live_applications(group):
                logger.warning(f"DeviceGroup {name!r} is freed: its run has ended, and no application runs in it")
                kill(self._groups.pop(name).holders)

    def _end_applications(self, group: _Group) -> None:
        """Deletes the applications that run in a group.

        Raises:
            MeshError: an application could not be deleted in time.
        """
        for application in _live_applications(group):
            logger.warning(f"application {application!r} is deleted: it runs in DeviceGroup {group.request.name!r}")
            try:
                serve.delete(application)
            except TimeoutError as error:
                raise MeshError(
                    f"application {application!r} in DeviceGroup {group.request.name!r} was not deleted within "
                    f"{APPLICATION_ENDS_S:g} s. See {serve_command('status')}."
                ) from error

    def _require_replaceable(self, group: DeviceGroup, job: str, occupied: Collection[str]) -> None:
        existing = self._groups.get(group.name)
        if existing is None:
            return
        if existing.job == job:
            runs = [f"application {name!r}" for name in _live_applications(existing)]
            if runs := [*runs, *["remote objects"] * (group.name in occupied)]:
                raise MeshError(
                    f"DeviceGroup {group.name!r} has ranks={existing.request.ranks} of {existing.devices.device_type}, "
                    f"this asks for ranks={group.ranks} of {group.device_type}, and {' and '.join(runs)} of this run "
                    "are in it. End them first (a sampler with its shutdown()), or keep the group unchanged."
                )
        elif job_runs(existing.job):
            raise MeshError(
                f"DeviceGroup {group.name!r} is reserved by another running job, with "
                f"ranks={existing.request.ranks} of {existing.devices.device_type}; this run asks for "
                f"ranks={group.ranks} of {group.device_type}. Give the group another name, or end the other job."
            )

    def _reserve_new(self, new: list[DeviceGroup], nodes: dict[str, list[Node]], job: str, owner: str) -> None:
        replaced = [self._groups[group.name] for group in new if group.name in self._groups]
        cuda = [group for group in new if group.device_type == "cuda"]
        cpu = [group for group in new if group.device_type == "cpu"]
        pool: dict[Device, ActorHandle] = {}
        try:
            gpus = self._gpus(cuda, nodes["cuda"], replaced, pool) if cuda else {}
            cores = self._cores(cpu, nodes["cpu"], replaced) if cpu else {}
            for old in replaced:  # their runs have ended, or nothing runs in them
                self._end_applications(old)
            if cores:
                # Ray cannot swap resources, so replaced groups release theirs first.
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
            group_holders = holders.get(group.name) or [pool.pop(device) for device in devices]
            shape = GroupDevices(group.name, cast(DeviceKind, group.device_type), devices, group.gpus_per_worker)
            self._groups[group.name] = _Group(group, shape, group_holders, job, owner)
        kill(list(pool.values()))

    def _gpus(
        self, groups: list[DeviceGroup], nodes: list[Node], replaced: list[_Group], pool: dict[Device, ActorHandle]
    ) -> dict[str, tuple[Device, ...]]:
        """Reserves every free GPU into `pool`, and allocates from it."""
        given_back = {d for group in replaced if group.devices.device_type == "cuda" for d in group.devices.devices}
        needed = sum(group.world_size for group in groups) - len(given_back)
        wait_for("GPU", needed, [node.id for node in nodes])
        slots: list[Slot] = []
        for node, gpus in zip(nodes, take_gpus(nodes), strict=True):
            for _, visible, _ in gpus:
                if visible:
                    self._visible[node.id] = visible
            # Without a list of ids, Ray numbers them from 0.
            ids = self._visible.get(node.id, [str(i) for i in range(node.devices)])
            free = {gpu: holder for gpu, _, holder in gpus}
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

    def _holder_of(self, device_type: str, device: Device, otherwise: str | None = OTHER_PROCESS) -> str | None:
        for name, group in self._groups.items():
            if group.devices.device_type == device_type and device in group.devices.devices:
                return f"group {name!r}"
        return otherwise


def ledger(*, create: bool = False) -> ActorHandle | None:
    """Returns the cluster's ledger; None if no run has started one and `create` is False.

    It runs on the head node, and so as long as the cluster.
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
            largest = max((node.devices for node in nodes_with(device_type, None)), default=0)
            raise MeshError(
                f"{argument}={wanted}, and no node of the cluster has more than {largest} {unit_of(device_type)}. "
                f"Lower {argument} or leave it out."
            )


def _live_applications(group: _Group) -> list[str]:
    """Applications of a group that still exist."""
    return sorted(group.applications & serve.status().applications.keys())
