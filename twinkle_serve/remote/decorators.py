"""`remote_class` and `remote_function`: a user's class in the workers of a device group.

@remote_class(execute="all")
class Embedder:
    def __init__(self, size: int) -> None: ...

    @remote_function(dispatch="slice_dp", collect="flatten")
    def embed(self, texts: list[str]) -> list[Vector]: ...

embedder = Embedder(64, remote_group="embedder")    # a worker for each device of the group
vectors = embedder.embed(texts)                     # as if there were one
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from twinkle_serve.errors import ConfigError, unknown_name
from twinkle_serve.remote.constructor import Arguments, give_mesh, take_mesh, without_group
from twinkle_serve.remote.dispatch import EXECUTES, Collect, Dispatch, Modes
from twinkle_serve.remote.lazy import LazyResult, resolved
from twinkle_serve.remote.session import current_group, session

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class RemoteFunction:
    """What `remote_function` was told."""

    function: Callable[..., Any]
    modes: Modes
    lazy_collect: bool | None


def remote_function(
    dispatch: Dispatch = "slice",
    execute: str = "all",
    collect: Collect = "none",
    sync: bool = False,
    lazy_collect: bool | None = None,
) -> Callable[[Function], Function]:
    """Lets callers of a remote class call this method.

    Lists and tuples among the arguments are batches; a dict, a string, an array or a named tuple is one item. All
    batches of a call have one length. Arrays arrive read-only, and so do those returned: Ray shares their memory.

    Args:
        dispatch: `slice`: each worker gets its part of every batch. `slice_dp`: each data-parallel rank of the mesh
            gets its part, and all its workers the same. `all`: every worker gets everything. A function is called as
            (length, i, args, kwargs, device_mesh) for worker i of `length` and returns its (args, kwargs).
        execute: `all` workers, the `first`, or the caller's `peer`: its share, where it is itself one of several.
        collect: `none`: a list of the answers; where only one worker ever answers, its answer. `flatten`: joined to
            what one worker would return. `mean`, `sum`: of numbers and arrays, elementwise, workers weighing alike.
            `first`: the first answer. `last_pp`: as `none`, of the last pipeline stage. A function is called as
            (all_results, device_mesh). Workers of one data-parallel rank answer once.
        sync: the method is collective: every worker is called, those without a share with an empty batch. Otherwise a
            worker without a share is not called.
        lazy_collect: return a LazyResult. None: as `initialize` says.

    Raises:
        ConfigError: an unknown mode, or a method that cannot be called from elsewhere.
    """
    modes = Modes(dispatch, execute, collect, sync)

    def decorate(function: Function) -> Function:
        _require_plain(function)
        remote = RemoteFunction(function, modes, lazy_collect)

        @functools.wraps(function)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = resolved(args, kwargs)
            result = function(self, *args, **kwargs)
            lazy = session.lazy_collect if lazy_collect is None else lazy_collect
            return LazyResult.of(result) if lazy and not function.__name__.startswith("__") else result

        call.remote = remote  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def remote_class(execute: str = "peer", *, startup_timeout_s: float = 600.0) -> Callable[[Class], Class]:
    """Lets objects of a class live in the workers of a device group.

    Given `remote_group=…`, the constructor starts a worker for each `gpus_per_worker` devices of the group, constructs
    the object in each, and returns a handle with its remote functions. A worker sees its own devices only. Without it,
    in mode `local`, and in a worker of that same group, the class is as it was written.

    `device_mesh=…` says how the workers are arranged; without, and without a global mesh, each is a data-parallel rank.
    A mesh smaller than the group uses its first devices. The class gets it where its constructor names `device_mesh`
    or annotates a parameter with DeviceMesh.

    Several classes can be in one group, as a model and what prepares its batches: their workers share its devices, and
    no device of another group.

    Args:
        execute: `all` workers of the group, the `first` only, or `peer`: of several callers that are themselves
            workers, each has its share; one caller has all.
        startup_timeout_s: how long processes and constructors may take together.

    Raises:
        ConfigError: an unknown mode.
    """
    if isinstance(execute, type):
        raise ConfigError(f"write @remote_class() above {execute.__name__}, with parentheses.")
    if execute not in EXECUTES:
        raise ConfigError(f"remote_class: {unknown_name('execute', execute, EXECUTES)}.")

    def decorate(kind: Class) -> Class:
        make: Any = kind.__new__
        construct: Any = kind.__init__  # type: ignore[misc]

        def __new__(made: type, *args: Any, **kwargs: Any) -> Any:
            if not _runs_here(made, kwargs.get("remote_group")):
                from twinkle_serve.remote.handle import spawn

                return spawn(made, execute, startup_timeout_s, args, kwargs)
            if make is object.__new__:
                return object.__new__(made)
            args, kwargs = _plain_arguments(made, args, kwargs)
            return make(made, *args, **kwargs)

        def __init_subclass__(made: Any, /, **kwargs: Any) -> None:
            if own_hook is None:
                super(cast("type[Any]", kind), made).__init_subclass__(**kwargs)
            else:
                own_hook.__func__(made, **kwargs)
            if "__init__" in vars(made):
                made.__init__ = _plain_constructor(made, made.__init__)

        own_hook: Any = vars(kind).get("__init_subclass__")
        kind.__new__ = __new__  # type: ignore[method-assign, assignment]
        takes_its_arguments_in_new = construct is object.__init__ and make is not object.__new__
        kind.__init__ = _plain_constructor(kind, None if takes_its_arguments_in_new else construct)  # type: ignore[misc]
        kind.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]
        return kind

    return decorate


def _plain_constructor(kind: type, construct: Any) -> Any:
    """A constructor that leaves out what only the decorator reads. None: one that takes everything and does nothing."""

    @functools.wraps(object.__init__ if construct is None else construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
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
            "initialize('local') to have it in this process."
        )
    return False


def _plain_arguments(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Without what only the decorator reads; with the global mesh where the class asks for one and gets none."""
    mesh, arguments = take_mesh(kind, args, without_group(kind, kwargs))
    return give_mesh(kind, arguments, mesh or session.mesh)


def _require_plain(function: object) -> None:
    name = getattr(function, "__name__", repr(function))
    flags = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    if not inspect.isfunction(function):
        raise ConfigError(f"remote_function goes on a plain method, not on {name}, a {type(function).__name__}.")
    if function.__code__.co_flags & flags:
        raise ConfigError(f"remote_function: {name} is async or a generator. Return a value or a list.")
    if name in ("__init__", "__new__", "__iter__", "__next__"):
        raise ConfigError(f"remote_function: {name} cannot be one. Give the class a method that returns a list.")
