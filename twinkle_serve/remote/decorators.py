"""`remote_class` and `remote_function`: a user's class in the workers of a device group.

@remote_class(execute="all")
class Embedder:
    def __init__(self, size: int) -> None: ...

    @remote_function(dispatch="slice_dp", collect="flatten")
    def embed(self, texts: list[str]) -> list[Vector]: ...

embedder = Embedder(64, remote_group="embedder")    # one worker per device of the group
vectors = embedder.embed(texts)                     # as if there were one object
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from twinkle_serve.errors import ConfigError, unknown_name
from twinkle_serve.remote.constructor import Arguments, give_mesh, take_mesh, without_group
from twinkle_serve.remote.dispatch import EXECUTES, Collect, Dispatch, Modes
from twinkle_serve.remote.lazy import Args, Kwargs, LazyResult, Value, resolved
from twinkle_serve.remote.notify import notifying
from twinkle_serve.remote.session import current_group, session

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class RemoteFunction:
    """A method and the arguments of its `remote_function`."""

    function: Callable[..., object]
    modes: Modes
    lazy_collect: bool | None


def remote_function(
    dispatch: Dispatch = "slice",
    execute: str = "all",
    collect: Collect = "none",
    sync: bool = False,
    lazy_collect: bool | None = None,
) -> Callable[[Function], Function]:
    """Makes a method of a remote class callable from outside.

    Lists and tuples among the arguments are batches; a dict, a string, an array or a named tuple is one item. All
    batches of a call have the same length. Arrays arrive read-only, and so do returned ones: Ray shares their memory.

    Args:
        dispatch: distribution of the arguments. `slice`: each worker gets its part of every batch. `slice_dp`: each
            data-parallel rank of the mesh gets its part, the same for all its workers. `all`: every worker gets
            everything. A function is called as (length, i, args, kwargs, device_mesh) for worker i of `length` and
            returns its (args, kwargs).
        execute: the workers that are called. `all`, the `first`, or the caller's `peer`: if the caller is itself one of
            several workers, its share of them.
        collect: how the answers are joined. `none`: a list of the answers; if only one worker answers, for any batch,
            its answer. `flatten`: concatenated to the result of a single worker. `mean`, `sum`: of numbers and arrays,
            elementwise, with equal weights. `avg`: as `mean`. `first`: the first answer. `last_pp`: as `none`, of the
            last pipeline stage. `last_pp_first`: its first answer. A function is called as (all_results, device_mesh).
            Workers of one data-parallel rank answer once.
        sync: whether the method is collective: every worker is called, those without a share with an empty batch.
            Otherwise a worker without a share is not called.
        lazy_collect: whether to return a LazyResult. None: as passed to `initialize`.

    Returns:
        A decorator for the method.

    Raises:
        ConfigError: an unknown mode, or a function that cannot be a remote function.
    """
    modes = Modes(dispatch, execute, collect, sync)

    def decorate(function: Function) -> Function:
        _require_plain(function)
        remote = RemoteFunction(function, modes, lazy_collect)

        @functools.wraps(function)
        def call(self: object, *args: Value, **kwargs: Value) -> Value:
            args, kwargs = resolved(args, kwargs)
            with notifying(f"{type(self).__name__}.{function.__name__}"):
                result = function(self, *args, **kwargs)
            lazy = session.lazy_collect if lazy_collect is None else lazy_collect
            return LazyResult.of(result) if lazy and not function.__name__.startswith("__") else result

        call.remote = remote  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def remote_class(execute: str = "peer", *, startup_timeout_s: float = 600.0) -> Callable[[Class], Class]:
    """Lets objects of a class run in the workers of a device group.

    With `remote_group=…`, the constructor starts one worker per `gpus_per_worker` devices of the group, constructs the
    object in each, and returns a handle with its remote functions. A worker sees only its own devices. Without it, in
    mode `local`, and in a worker of that same group, the class behaves as written. Several classes can share a group,
    for example a model and a class that prepares its batches: their workers share its devices, and no others.

    `device_mesh=…` arranges the workers; without it, and without a global mesh, each is a data-parallel rank. A mesh
    smaller than the group uses its first devices. A parameter named `device_mesh` or annotated with DeviceMesh gets it.

    The constructor then raises MeshError for an unknown group or a mesh that does not fit, TypeError for unknown
    arguments, WorkerError if a worker died or was not ready in time, and the class's own exceptions.

    Args:
        execute: the workers that are started. `all` of the group, the `first` only, or `peer`: if several callers are
            themselves workers, each gets its share; a single caller gets all.
        startup_timeout_s: deadline for processes and constructors together, seconds.

    Returns:
        A decorator for the class.

    Raises:
        ConfigError: an unknown mode.
    """
    if isinstance(execute, type):
        raise ConfigError(f"write @remote_class() above {execute.__name__}, with parentheses.")
    if execute not in EXECUTES:
        raise ConfigError(f"remote_class: {unknown_name('execute', execute, EXECUTES)}.")

    def decorate(kind: Class) -> Class:
        make: Callable[..., object] = kind.__new__
        construct: Callable[..., None] = kind.__init__  # type: ignore[misc]

        def __new__(cls: type, *args: Value, **kwargs: Value) -> object:
            if not _runs_here(cls, kwargs.get("remote_group")):
                from twinkle_serve.remote.handle import spawn

                return spawn(cls, execute, startup_timeout_s, args, kwargs)
            if make is object.__new__:
                return object.__new__(cls)
            args, kwargs = _plain_arguments(cls, args, kwargs)
            return make(cls, *args, **kwargs)

        def __init_subclass__(cls: type, /, **kwargs: Value) -> None:
            if own_hook is None:
                super(cast("type[object]", kind), cls).__init_subclass__(**kwargs)  # type: ignore[misc]
            else:
                own_hook.__func__(cls, **kwargs)
            if "__init__" in vars(cls):
                cls.__init__ = _plain_constructor(cls, cls.__init__)  # type: ignore[misc]

        own_hook: classmethod[object, ..., None] | None = vars(kind).get("__init_subclass__")
        kind.__new__ = __new__  # type: ignore[method-assign, assignment]
        takes_its_arguments_in_new = construct is object.__init__ and make is not object.__new__
        kind.__init__ = _plain_constructor(kind, None if takes_its_arguments_in_new else construct)  # type: ignore[misc]
        kind.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]
        return kind

    return decorate


def _plain_constructor(kind: type, construct: Callable[..., None] | None) -> Callable[..., None]:
    """Wraps a constructor to drop the decorator's arguments. For None, a constructor that accepts and ignores all."""

    @functools.wraps(object.__init__ if construct is None else construct)
    def __init__(self: object, *args: Value, **kwargs: Value) -> None:
        if construct is not None:
            args, kwargs = _plain_arguments(kind, args, kwargs)
            construct(self, *args, **kwargs)

    return __init__


def _runs_here(kind: type, group: str | None) -> bool:
    if group is None or session.mode == "local" or group == current_group():
        return True
    if session.mode is None:
        raise ConfigError(
            f"{kind.__name__}(remote_group={group!r}) before initialize. Call initialize('ray', groups=…), or "
            "initialize('local') to run it in this process."
        )
    return False


def _plain_arguments(kind: type, args: Args, kwargs: Kwargs) -> Arguments:
    """Drops the decorator's arguments, and adds the global mesh if the class has a parameter for it and got none."""
    mesh, arguments = take_mesh(kind, args, without_group(kind, kwargs))
    return give_mesh(kind, arguments, mesh or session.mesh)


def _require_plain(function: object) -> None:
    name = getattr(function, "__name__", repr(function))
    flags = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    if not inspect.isfunction(function):
        raise ConfigError(f"remote_function decorates plain methods, {name} is a {type(function).__name__}.")
    if function.__code__.co_flags & flags:
        raise ConfigError(f"remote_function: {name} is async or a generator. Return a value or a list.")
    if name in ("__init__", "__new__", "__iter__", "__next__"):
        raise ConfigError(f"remote_function: {name} is not supported. Give the class a method that returns a list.")
