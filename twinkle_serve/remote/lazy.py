"""A result that stays with the workers until somebody needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class LazyResult:
    """Call it for the result.

    Given to a remote function, it travels as references: the workers fetch it from those that made it.

    Guarantees: the result is fetched and collected once in a process, however often it is called.
    Does not guarantee: that it outlives the cluster, or the nodes that hold the answers.
    """

    def __init__(self, fetch: Callable[[], Any]) -> None:
        self._fetch = fetch
        self._there = False
        self._value: Any = None

    @classmethod
    def of(cls, value: Any) -> LazyResult:
        """One that is there."""
        lazy = cls(_nothing)
        lazy._there, lazy._value = True, value
        return lazy

    def __call__(self) -> Any:
        """The result.

        Raises:
            Exception: what the method raised in a worker.
            WorkerError: a worker died.
        """
        if not self._there:
            self._value = self._fetch()
            self._there = True
        return self._value

    def __repr__(self) -> str:
        return f"LazyResult({self._value if self._there else '…'!r})"


def _nothing() -> Any:
    raise AssertionError("it has a value")


def is_lazy(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an argument is a LazyResult."""
    return any(isinstance(value, LazyResult) for value in (*args, *kwargs.values()))


def resolved(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with results in place of lazy ones."""

    def result(value: Any) -> Any:
        return value() if isinstance(value, LazyResult) else value

    return tuple(result(value) for value in args), {name: result(value) for name, value in kwargs.items()}
