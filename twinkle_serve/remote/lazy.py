"""Results that stay with the workers until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Value: TypeAlias = Any
"""An argument or the result of a user's method."""

Args: TypeAlias = tuple[Value, ...]
Kwargs: TypeAlias = dict[str, Value]


class LazyResult:
    """Result of a lazy remote function; call it to fetch the result.

    Passed to a remote function, it is sent as references: the workers fetch it from those that made it.

    Guarantees:
        - The result is fetched and collected once per process, however often it is called.

    Does not guarantee:
        - That the result outlives the cluster, or the nodes that hold the answers.
    """

    def __init__(self, fetch: Callable[[], Value]) -> None:
        self._fetch = fetch
        self._there = False
        self._value: Value = None

    @classmethod
    def of(cls, value: Value) -> LazyResult:
        """Wraps an existing value."""
        lazy = cls(_nothing)
        lazy._there, lazy._value = True, value
        return lazy

    def __call__(self) -> Value:
        """Returns the result.

        Raises:
            Exception: the exception of the method in a worker.
            WorkerError: a worker died.
        """
        if not self._there:
            self._value = self._fetch()
            self._there = True
        return self._value

    def __repr__(self) -> str:
        return f"LazyResult({self._value if self._there else '…'!r})"


def _nothing() -> Value:
    raise AssertionError("it has a value")


def is_lazy(args: Args, kwargs: Mapping[str, Value]) -> bool:
    """Whether an argument is a LazyResult."""
    return any(isinstance(value, LazyResult) for value in (*args, *kwargs.values()))


def resolved(args: Args, kwargs: Mapping[str, Value]) -> tuple[Args, Kwargs]:
    """Replaces lazy arguments by their results."""

    def result(value: Value) -> Value:
        return value() if isinstance(value, LazyResult) else value

    return tuple(result(value) for value in args), {name: result(value) for name, value in kwargs.items()}
