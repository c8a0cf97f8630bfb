"""Who is called with what, and what becomes of the answers. Plain functions: a worker is a number.

Names and meanings of the modes: Twinkle's `remote_function`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twinkle_serve.errors import ConfigError, MeshError, RequestError, unknown_name
from twinkle_serve.mesh import DeviceMesh

Dispatch = str | Callable[..., Any]
Collect = str | Callable[..., Any]

DISPATCHES = ("all", "slice", "slice_dp")
EXECUTES = ("all", "first", "peer")
COLLECTS = ("first", "flatten", "last_pp", "mean", "none", "sum")


@dataclass(frozen=True, slots=True)
class Modes:
    """How the calls of a method travel.

    Raises:
        ConfigError: a mode that does not exist.
    """

    dispatch: Dispatch = "slice"
    execute: str = "all"
    collect: Collect = "none"
    sync: bool = False
    """A collective method: every worker takes part, even one without a share."""

    def __post_init__(self) -> None:
        for what, value, known in (("dispatch", self.dispatch, DISPATCHES), ("collect", self.collect, COLLECTS)):
            if not callable(value) and value not in known:
                raise ConfigError(f"remote_function: {unknown_name(what, value, known)}, or a function.")
            if callable(value):
                _require_arguments(what, value)
        if self.execute not in EXECUTES:
            raise ConfigError(f"remote_function: {unknown_name('execute', self.execute, EXECUTES)}.")
        if self.sync and self.execute != "all":
            raise ConfigError(f"remote_function: sync=True calls every worker, execute={self.execute!r} does not.")


ARGUMENTS = {"dispatch": "length, i, args, kwargs, device_mesh", "collect": "all_results, device_mesh"}
"""What functions among the modes are called with."""


def _require_arguments(what: str, function: Callable[..., Any]) -> None:
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
    """Where each worker stands in the mesh."""

    mesh: DeviceMesh
    data_ranks: tuple[int, ...]
    """Of each worker. Workers that share one get the same data, and answer the same."""
    pp_ranks: tuple[int, ...]

    @classmethod
    def of(cls, mesh: DeviceMesh, gpus_per_worker: int = 1) -> Layout:
        """Worker i has the ranks from i * gpus_per_worker on.

        Raises:
            MeshError: the mesh does not divide into such workers, or a worker would have two data-parallel ranks.
        """
        if mesh.world_size % gpus_per_worker:
            raise MeshError(
                f"device_mesh of {mesh.world_size} devices cannot be shared out in workers of "
                f"gpus_per_worker={gpus_per_worker}."
            )
        data_ranks, pp_ranks = [], []
        for first in range(0, mesh.world_size, gpus_per_worker):
            mine = {_data_rank(mesh, rank) for rank in range(first, first + gpus_per_worker)}
            if len(mine) > 1:
                raise MeshError(
                    f"gpus_per_worker={gpus_per_worker} would put {len(mine)} data-parallel ranks of device_mesh into "
                    "one worker. Lower gpus_per_worker, or give the mesh a tp_size."
                )
            data_ranks.append(mine.pop())
            pp_ranks.append(_coordinates(mesh, first).get("pp", 0))
        return cls(mesh, tuple(data_ranks), tuple(pp_ranks))

    @classmethod
    def data_parallel(cls, workers: int, gpus_per_worker: int = 1) -> Layout:
        """Where there is no mesh, every worker has data of its own."""
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
    """dp and fsdp both split data; ulysses joins neighbours again, who share a sequence."""
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
    """What one worker is called with."""

    worker: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    order: int | None
    """Place of its answer among those collected; None where another worker answers for it."""


@dataclass(frozen=True, slots=True)
class Plan:
    calls: tuple[Call, ...]
    single: bool
    """One worker answers whatever the batch, so that `none` and `last_pp` return its answer and no list of one."""


def peers(count: int, rank: int, world_size: int) -> list[int]:
    """The workers of `count` that fall to caller `rank` of `world_size`. More callers than workers share them."""
    if count < world_size:
        return [rank % count]
    share = split(count, world_size)[rank]
    return list(range(share.start, share.stop))


def executing(execute: str, count: int, caller: tuple[int, int] = (0, 1)) -> list[int]:
    """The workers that a mode calls. `caller` is the rank and the world size of the calling process."""
    if execute == "first":
        return [0]
    return peers(count, *caller) if execute == "peer" else list(range(count))


def split(length: int, parts: int) -> list[slice]:
    """Runs of neighbours whose lengths differ by one at most, longer ones first."""
    size, longer = divmod(length, parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def is_batch(value: object) -> bool:
    """What slicing splits: lists and tuples. A dict, a string, an array or a named tuple is one item."""
    return isinstance(value, list) or (isinstance(value, tuple) and not hasattr(value, "_fields"))


def plan(
    modes: Modes, layout: Layout, args: tuple[Any, ...], kwargs: Mapping[str, Any], caller: tuple[int, int] = (0, 1)
) -> Plan:
    """The calls of one invocation.

    Every answer is collected once: from one worker of each data-parallel rank, or from each that has a slice of its
    own. A worker without a share is not called, unless the method is collective. An empty batch calls nobody, unless
    the result cannot be made of nothing: then the first data-parallel rank gets the empty batch.

    Raises:
        RequestError: lists of different lengths are to be sliced.
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
    if not called and (single or modes.collect in ("first", "mean", "sum")):
        called = [worker for worker in workers if share_of[worker] == 0]
    answering = [w for w in speakers if w in called and (length == 0 or shares[share_of[w]].start < length)]
    order = {worker: place for place, worker in enumerate(answering)}
    return Plan(
        tuple(
            Call(worker, *_sliced(args, kwargs, shares[share_of[worker]]), order=order.get(worker)) for worker in called
        ),
        single,
    )


def _last_stage(modes: Modes, layout: Layout, workers: list[int]) -> list[int]:
    if modes.collect != "last_pp":
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
    function: Callable[..., Any],
    layout: Layout,
    workers: list[int],
    speakers: list[int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Call, ...]:
    """As the function says; it may give every worker data of its own, so all answers count."""
    calls = []
    for place, worker in enumerate(workers):
        answer = function(len(workers), place, args, dict(kwargs), layout.mesh)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
            raise RequestError(f"a dispatch function returns (args, kwargs) of one worker, got {answer!r:.200}.")
        order = speakers.index(worker) if worker in speakers else None
        calls.append(Call(worker, tuple(answer[0]), dict(answer[1]), order))
    return tuple(calls)


def _batch_length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Items of the lists to be sliced; None where there are none."""
    named = [*((f"argument {i}", value) for i, value in enumerate(args)), *kwargs.items()]
    lengths = {name: len(value) for name, value in named if is_batch(value)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise RequestError(
            f"lists of different lengths cannot be sliced alike: {listed}. Pass what is no batch as something else, "
            "such as a dict, or decorate the method with dispatch='all' or a function."
        )
    return next(iter(lengths.values()), None)


def _sliced(args: tuple[Any, ...], kwargs: Mapping[str, Any], share: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cut(value: Any) -> Any:
        return value[share] if is_batch(value) else value

    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}
