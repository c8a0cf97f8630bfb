"""The caller's side of a remote class: starts its workers, calls them, and collects the answers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from twinkle_serve.errors import MeshError, WorkerError
from twinkle_serve.mesh import DeviceMesh
from twinkle_serve.placement import Device, GroupDevices
from twinkle_serve.remote.collect import collect
from twinkle_serve.remote.constructor import give_mesh, signature_of, take_mesh, without_group
from twinkle_serve.remote.dispatch import Call, Collect, Layout, Plan, executing, peers, plan
from twinkle_serve.remote.lazy import Args, Kwargs, LazyResult, Value, is_lazy
from twinkle_serve.remote.notify import notifying
from twinkle_serve.remote.reservation import group_devices
from twinkle_serve.remote.session import session
from twinkle_serve.remote.worker import Reply, Worker

if TYPE_CHECKING:
    from twinkle_serve.remote.decorators import RemoteFunction

DUNDERS = ("__call__", "__contains__", "__getitem__", "__len__")
"""Python looks these up on the type, so a handle's type needs them."""


class Handle:
    """Handle to an object in the workers of a group; only its remote functions can be called.

    Guarantees:
        - A call returns when all called workers have answered, and raises when the first one fails or dies.
        - Calls from several threads reach all workers in the same order.

    Does not guarantee:
        - That the other workers have stopped when a call raises. They finish before the next call.
    """

    def __init__(self, kind: type, group: str, layout: Layout, workers: Sequence[ActorHandle]) -> None:
        self._kind = kind
        self._layout = layout
        self._workers = tuple(workers)
        self._names = [f"worker {rank} of {kind.__name__} in group {group!r}" for rank in range(len(workers))]
        self._lock = threading.Lock()
        self.remote_group = group
        self.device_mesh = layout.mesh

    def __getattr__(self, name: str) -> Callable[..., Value]:
        if name.startswith("_") and name not in DUNDERS:
            raise AttributeError(name)
        remote = getattr(getattr(self._kind, name, None), "remote", None)
        if remote is None:
            raise AttributeError(
                f"{self._kind.__name__}.{name} is not a remote function, and the object is in the workers of group "
                f"{self.remote_group!r}. Decorate methods that are called from here with @remote_function."
            )

        def call(*args: Value, **kwargs: Value) -> Value:
            return self._call(name, remote, args, kwargs)

        return call

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self._kind, self.remote_group, self._layout, self._workers)

    def __repr__(self) -> str:
        return f"<{self._kind.__name__} on {len(self._workers)} workers of group {self.remote_group!r}>"

    def _call(self, name: str, remote: RemoteFunction, args: Args, kwargs: Kwargs) -> Value:
        caller = _caller()
        if is_lazy(args, kwargs):
            workers = executing(remote.modes.execute, len(self._workers), caller)
            planned = Plan(tuple(Call(worker, args, kwargs, None) for worker in workers), single=False)
        else:
            planned = plan(remote.modes, self._layout, args, kwargs, caller)
        with self._lock:
            refs = [
                self._workers[call.worker].call.remote(name, call.args, call.kwargs, call.order, planned.single, caller)
                for call in planned.calls
            ]
        names = [self._names[call.worker] for call in planned.calls]
        function = f"{self._kind.__name__}.{name}"
        answers = _Answers(refs, names, remote.modes.collect, self._layout.mesh, planned.single, function)
        lazy = remote.lazy_collect if remote.lazy_collect is not None else session.lazy_collect
        if remote.modes.sync:
            value = answers()
            return LazyResult.of(value) if lazy else value
        return LazyResult(answers) if lazy and name not in DUNDERS else answers()

    def _kill(self) -> None:
        for worker in self._workers:
            ray.kill(worker)


class _Answers:
    """Pending answers; calling it waits for them and collects them."""

    def __init__(
        self,
        refs: Sequence[ray.ObjectRef],
        names: Sequence[str],
        method: Collect,
        mesh: DeviceMesh,
        single: bool,
        function: str,
    ) -> None:
        self._refs = list(refs)
        self._names = list(names)
        self._method = method
        self._mesh = mesh
        self._single = single
        self._function = function

    def __call__(self) -> Value:
        with notifying(self._function):
            return self._collected()

    def _collected(self) -> Value:
        replies = _gather(self._refs, self._names)
        single = replies[0].single if replies else self._single
        answers = {reply.order: reply.value for reply in replies if reply.order is not None}
        return collect(self._method, [answers[i] for i in sorted(answers)], single=single, mesh=self._mesh)


def _gather(refs: Sequence[ray.ObjectRef], names: Sequence[str], deadline: float | None = None) -> list[Reply]:
    """Waits for the replies and returns them in the order of `refs`.

    Args:
        refs: references to the replies.
        names: names of the workers for messages.
        deadline: on the monotonic clock, seconds. None: none.

    Raises:
        Exception: the exception of the first worker that failed.
        WorkerError: a worker died, or did not answer in time.
    """
    place = {ref: index for index, ref in enumerate(refs)}
    replies: dict[int, Reply] = {}
    waiting = list(refs)
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        done, waiting = ray.wait(waiting, timeout=left)
        if not done:
            late = ", ".join(names[place[ref]] for ref in waiting)
            raise WorkerError(f"{late} not ready in time. Raise startup_timeout_s of its remote_class.")
        for ref in done:
            name = names[place[ref]]
            try:
                reply: Reply = ray.get(ref)
            except RayTaskError as error:
                raise WorkerError(f"{name} failed: {type(error.cause).__name__}: {error.cause}") from error
            except RayError as error:
                raise WorkerError(f"{name} died: {error}") from error
            if reply.failure is not None:
                raise reply.failure.error(name)
            replies[place[ref]] = reply
    return [replies[index] for index in range(len(refs))]


def spawn(kind: type, execute: str, startup_timeout_s: float, args: Args, kwargs: Kwargs) -> Handle:
    """Starts the workers of an instance in its group, and constructs the object in each.

    Raises:
        MeshError: no such group, or a mesh that does not fit it.
        TypeError: arguments that the constructor does not have.
        WorkerError: a worker died or was not ready within `startup_timeout_s`. All workers are killed then.
        Exception: the constructor's exception. All workers are killed then.
    """
    name = str(kwargs["remote_group"])
    group = group_devices(name)
    mesh, arguments = take_mesh(kind, args, without_group(kind, kwargs))
    devices, layout = _assign_devices(group, execute, mesh or session.mesh)
    args, kwargs = give_mesh(kind, arguments, layout.mesh)
    signature_of(kind).bind(*args, **kwargs)
    workers = [
        _start_worker(kind.__name__, group, share, layout, rank, len(devices)) for rank, share in enumerate(devices)
    ]
    handle = _rebuild(kind, name, layout, workers)
    try:
        deadline = time.monotonic() + startup_timeout_s
        master = _gather([workers[0].rendezvous.remote()], handle._names, deadline)[0].value
        refs = [worker.construct.remote(master, kind, args, kwargs) for worker in workers]
        _gather(refs, handle._names, deadline)
    except BaseException:
        handle._kill()
        raise
    session.instances.add(handle)
    return handle


def _rebuild(kind: type, group: str, layout: Layout, workers: Sequence[ActorHandle]) -> Handle:
    """Makes a handle whose type has the dunder methods that are remote functions of the class."""

    def method(name: str) -> Callable[..., Value]:
        def call(self: Handle, *args: Value, **kwargs: Value) -> Value:
            return self.__getattr__(name)(*args, **kwargs)

        return call

    dunders = {name: method(name) for name in DUNDERS if getattr(getattr(kind, name, None), "remote", None) is not None}
    handle_type = type(kind.__name__, (Handle,), dunders) if dunders else Handle
    handle: Handle = handle_type(kind, group, layout, workers)
    return handle


def _caller() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _assign_devices(
    group: GroupDevices, execute: str, mesh: DeviceMesh | None
) -> tuple[list[tuple[Device, ...]], Layout]:
    """Returns the devices of each worker, and their layout."""
    size = group.gpus_per_worker
    shares = [group.devices[start : start + size] for start in range(0, len(group.devices), size)]
    if execute == "first":
        return shares[:1], Layout.data_parallel(1, size)
    if execute == "peer":
        shares = [shares[worker] for worker in peers(len(shares), *_caller())]
    if mesh is None:
        return shares, Layout.data_parallel(len(shares), size)
    if mesh.device_type not in ("auto", group.device_type):
        raise MeshError(
            f"device_mesh.device_type is {mesh.device_type}, group {group.name!r} has {group.device_type} devices. "
            "Leave device_mesh.device_type out, or name another group."
        )
    if mesh.world_size > len(shares) * size:
        dims = " x ".join(f"{name}_size={length}" for name, length in mesh.sizes)
        raise MeshError(
            f"device_mesh needs {mesh.world_size} devices ({dims}), group {group.name!r} has {len(shares) * size}. "
            "Lower a size of device_mesh, or give the group more ranks."
        )
    layout = Layout.of(mesh, size)
    return shares[: layout.workers], layout


def _start_worker(
    kind: str, group: GroupDevices, devices: tuple[Device, ...], layout: Layout, rank: int, world_size: int
) -> ActorHandle:
    """Starts a worker's process. The group's holders reserve its devices in Ray, so it requests none."""
    cuda = group.device_type == "cuda"
    environment: Mapping[str, str] = {
        "CUDA_VISIBLE_DEVICES": ",".join(device.id for device in devices) if cuda else "",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        # A worker sees only its own devices, so it is the only one on its "node".
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "CLUSTER_NAME": group.name,
        "WORKER_NAME": f"{group.name}-{kind}-{rank}",
        "TWINKLE_MODE": "ray",
        **({} if session.seed is None else {"TWINKLE_SEED": str(session.seed)}),
        **({} if cuda else {"OMP_NUM_THREADS": str(len(devices))}),
    }
    state = {"mode": "ray", "seed": session.seed, "lazy_collect": session.lazy_collect, "mesh": session.mesh}
    affinity = NodeAffinitySchedulingStrategy(devices[0].node_id, soft=False)
    return (
        ray.remote(Worker)
        .options(num_cpus=0, num_gpus=0, max_restarts=0, scheduling_strategy=affinity)
        .remote(environment, devices, layout, state)
    )
