"""Plans the calls of a remote function: its workers and their arguments. Free of Ray: workers are numbers.

Names and meanings of the modes follow Twinkle's `remote_function`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

from twinkle_serve.errors import ConfigError, MeshError, RequestError, unknown_name
from twinkle_serve.mesh import DeviceMesh
from twinkle_serve.remote.lazy import Args, Kwargs, Value

Dispatch: TypeAlias = str | Callable[..., object]
Collect: TypeAlias = str | Callable[..., object]

DISPATCHES = ("all", "slice", "slice_dp")
EXECUTES = ("all", "first", "peer")
COLLECTS = ("avg", "first", "flatten", "last_pp", "last_pp_first", "mean", "none", "sum")
ONE_ANSWER = ("avg", "first", "last_pp_first", "mean", "sum")
"""Those whose result needs an answer, also of an empty batch."""


@dataclass(frozen=True, slots=True)
class Modes:
    """Modes of a remote function, as documented there.

    Raises:
        ConfigError: an unknown mode, or a function with other parameters.
    """

    dispatch: Dispatch = "slice"
    execute: str = "all"
    collect: Collect = "none"
    sync: bool = False
    """Whether the method is collective: every worker is called, even one without a share."""

    def __post_init__(self) -> None:
        for what, value, names in (("dispatch", self.dispatch, DISPATCHES), ("collect", self.collect, COLLECTS)):
            if not callable(value) and value not in names:
                raise ConfigError(f"remote_function: {unknown_name(what, value, names)}, or a function.")
            if callable(value):
                _require_arguments(what, value)
        if self.execute not in EXECUTES:
            raise ConfigError(f"remote_function: {unknown_name('execute', self.execute, EXECUTES)}.")
        if self.sync and self.execute != "all":
            raise ConfigError(f"remote_function: sync=True calls every worker, execute={self.execute!r} does not.")


ARGUMENTS = {"dispatch": "length, i, args, kwargs, device_mesh", "collect": "all_results, device_mesh"}
"""Parameters of functions among the modes."""


def _require_arguments(what: str, function: Callable[..., object]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*ARGUMENTS[what].split(", "))
    except TypeError:
        raise ConfigError(
            f"remote_function: {what} is called with ({ARGUMENTS[what]}), {function!r} takes {signature}."
        ) from None


@dataclass(frozen=True, slots=True)
class Layout:
    """Position of each worker in the mesh."""

    mesh: DeviceMesh
    data_ranks: tuple[int, ...]
    """Data-parallel rank of each worker. Workers of the same rank get the same data, and give the same answer."""
    pp_ranks: tuple[int, ...]
    """Pipeline stage of each worker."""

    @classmethod
    def of(cls, mesh: DeviceMesh, gpus_per_worker: int = 1) -> Layout:
        """Lays out workers on a mesh; worker i has the ranks from i * gpus_per_worker on.

        Raises:
            MeshError: the mesh does not divide into such workers, or a worker would have two data-parallel ranks.
        """
        if mesh.world_size % gpus_per_worker:
            raise MeshError(
                f"device_mesh of {mesh.world_size} devices cannot be divided into workers of "
                f"gpus_per_worker={gpus_per_worker}."
            )
        data_ranks, pp_ranks = [], []
        for first in range(0, mesh.world_size, gpus_per_worker):
            ranks = {_data_rank(mesh, rank) for rank in range(first, first + gpus_per_worker)}
            if len(ranks) > 1:
                raise MeshError(
                    f"gpus_per_worker={gpus_per_worker} would put {len(ranks)} data-parallel ranks of device_mesh into "
                    "one worker. Lower gpus_per_worker, or give the mesh a tp_size."
                )
            data_ranks.append(ranks.pop())
            pp_ranks.append(_coordinates(mesh, first).get("pp", 0))
        return cls(mesh, tuple(data_ranks), tuple(pp_ranks))

    @classmethod
    def data_parallel(cls, workers: int, gpus_per_worker: int = 1) -> Layout:
        """Layout without a mesh: every worker is a data-parallel rank."""
        tp_size = gpus_per_worker if gpus_per_worker > 1 else None
        return cls.of(DeviceMesh.from_sizes(dp_size=workers, tp_size=tp_size), gpus_per_worker)

    @property
    def workers(self) -> int:
        return len(self.data_ranks)


def _coordinates(mesh: DeviceMesh, rank: int) -> dict[str, int]:
    coordinates = {}
    for name, size in reversed(mesh.sizes):
        rank, coordinates[name] = divmod(rank, size)
    return coordinates


def _data_rank(mesh: DeviceMesh, rank: int) -> int:
    """Index of a rank's data: dp and fsdp both split data, and ulysses neighbours share a sequence."""
    at = _coordinates(mesh, rank)
    ranks, fsdp_size = mesh.dp_size * mesh.size("fsdp"), mesh.size("fsdp")
    if ranks % mesh.ulysses_size:
        raise MeshError(
            f"device_mesh.ulysses_size={mesh.ulysses_size} does not divide its {ranks} data-parallel ranks "
            f"(dp_size={mesh.dp_size} x fsdp_size={fsdp_size})."
        )
    return (at.get("dp", 0) * fsdp_size + at.get("fsdp", 0)) // mesh.ulysses_size


@dataclass(frozen=True, slots=True)
class Call:
    """The call of one worker."""

    worker: int
    args: Args
    kwargs: Kwargs
    order: int | None
    """Position of its answer among those collected; None if another worker answers for it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The calls of one invocation."""

    calls: tuple[Call, ...]
    single: bool
    """Whether one worker answers, for any batch, so that `none` and `last_pp` return its answer instead of a list."""


def peers(count: int, rank: int, world_size: int) -> list[int]:
    """Returns the share of caller `rank` of `world_size` in `count` workers. More callers than workers share them."""
    if count < world_size:
        return [rank % count]
    share = split(count, world_size)[rank]
    return list(range(share.start, share.stop))


def executing(execute: str, count: int, caller: tuple[int, int] = (0, 1)) -> list[int]:
    """Returns the workers that a mode calls. `caller` is the rank and the world size of the calling process."""
    if execute == "first":
        return [0]
    return peers(count, *caller) if execute == "peer" else list(range(count))


def split(length: int, parts: int) -> list[slice]:
    """Splits a batch into consecutive parts whose lengths differ by one at most, longer ones first."""
    size, longer = divmod(length, parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def is_batch(value: object) -> TypeGuard[list[Value] | tuple[Value, ...]]:
    """Whether an argument is sliced: a list or a tuple. A dict, a string, an array or a named tuple is one item."""
    return isinstance(value, list) or (isinstance(value, tuple) and not hasattr(value, "_fields"))


def plan(
    modes: Modes, layout: Layout, args: Args, kwargs: Mapping[str, Value], caller: tuple[int, int] = (0, 1)
) -> Plan:
    """Plans the calls of one invocation.

    Every answer is collected once: from one worker of each data-parallel rank, or from each worker with its own slice.
    A worker without a share is not called unless the method is collective. An empty batch calls no worker, unless the
    result needs an answer: then the first data-parallel rank gets the empty batch.

    Raises:
        RequestError: lists of different lengths would be sliced.
    """
    workers = executing(modes.execute, layout.workers, caller)
    speakers = _speakers(modes, layout, workers)
    single = len(speakers) == 1
    if callable(modes.dispatch):
        speakers = _last_stage(modes, layout, workers)
        return Plan(_by_function(modes.dispatch, layout, workers, speakers, args, kwargs), len(speakers) == 1)
    length = _batch_length(args, kwargs) if modes.dispatch != "all" and len(workers) > 1 else None
    if length is None:
        order = {worker: place for place, worker in enumerate(speakers)}
        return Plan(tuple(Call(worker, args, dict(kwargs), order.get(worker)) for worker in workers), single)
    if modes.dispatch == "slice":
        speakers, share_of = _last_stage(modes, layout, workers), {worker: i for i, worker in enumerate(workers)}
        single = len(speakers) == 1
    else:
        places = {rank: i for i, rank in enumerate(sorted({layout.data_ranks[worker] for worker in workers}))}
        share_of = {worker: places[layout.data_ranks[worker]] for worker in workers}
    shares = split(length, max(share_of.values()) + 1)
    called = [worker for worker in workers if modes.sync or shares[share_of[worker]].start < length]
    if not called and (single or modes.collect in ONE_ANSWER):
        called = [worker for worker in workers if share_of[worker] == 0]
    answering = [w for w in speakers if w in called and (length == 0 or shares[share_of[w]].start < length)]
    order = {worker: place for place, worker in enumerate(answering)}
    return Plan(
        tuple(
            Call(worker, *_slice(args, kwargs, shares[share_of[worker]]), order=order.get(worker)) for worker in called
        ),
        single,
    )


def _last_stage(modes: Modes, layout: Layout, workers: list[int]) -> list[int]:
    if modes.collect not in ("last_pp", "last_pp_first"):
        return workers
    last = max(layout.pp_ranks[worker] for worker in workers)
    return [worker for worker in workers if layout.pp_ranks[worker] == last]


def _speakers(modes: Modes, layout: Layout, workers: list[int]) -> list[int]:
    """One worker of each data-parallel rank, in the order of these ranks."""
    first: dict[int, int] = {}
    for worker in _last_stage(modes, layout, workers):
        first.setdefault(layout.data_ranks[worker], worker)
    return [first[rank] for rank in sorted(first)]


def _by_function(
    function: Callable[..., object],
    layout: Layout,
    workers: list[int],
    speakers: list[int],
    args: Args,
    kwargs: Mapping[str, Value],
) -> tuple[Call, ...]:
    """Calls planned by a dispatch function. It may give every worker its own data, so all answers are collected."""
    calls = []
    for place, worker in enumerate(workers):
        answer = function(len(workers), place, args, dict(kwargs), layout.mesh)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
            raise RequestError(f"a dispatch function must return (args, kwargs) of one worker, got {answer!r:.200}.")
        order = speakers.index(worker) if worker in speakers else None
        calls.append(Call(worker, tuple(answer[0]), dict(answer[1]), order))
    return tuple(calls)


def _batch_length(args: Args, kwargs: Mapping[str, Value]) -> int | None:
    """Length of the lists to slice; None if there are none."""
    named = [*((f"argument {i}", value) for i, value in enumerate(args)), *kwargs.items()]
    lengths = {name: len(value) for name, value in named if is_batch(value)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise RequestError(
            f"lists of different lengths cannot be sliced together: {listed}. Pass lists that are not batches in "
            "another type, such as a dict, or decorate the method with dispatch='all' or a function."
        )
    return next(iter(lengths.values()), None)


def _slice(args: Args, kwargs: Mapping[str, Value], share: slice) -> tuple[Args, Kwargs]:
    def cut(value: Value) -> Value:
        return value[share] if is_batch(value) else value

    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}
