"""Results that stay with the workers until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class LazyResult:
    """Result of a lazy remote function; call it to fetch the result.

    Passed to a remote function, it is sent as references: the workers fetch it from those that made it.

    Guarantees:
        - The result is fetched and collected once per process, however often it is called.

    Does not guarantee:
        - That the result outlives the cluster, or the nodes that hold the answers.
    """

    def __init__(self, fetch: Callable[[], Any]) -> None:
        self._fetch = fetch
        self._there = False
        self._value: Any = None

    @classmethod
    def of(cls, value: Any) -> LazyResult:
        """Wraps an existing value."""
        lazy = cls(_nothing)
        lazy._there, lazy._value = True, value
        return lazy

    def __call__(self) -> Any:
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


def _nothing() -> Any:
    raise AssertionError("it has a value")


def is_lazy(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an argument is a LazyResult."""
    return any(isinstance(value, LazyResult) for value in (*args, *kwargs.values()))


def resolved(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replaces lazy arguments by their results."""

    def result(value: Any) -> Any:
        return value() if isinstance(value, LazyResult) else value

    return tuple(result(value) for value in args), {name: result(value) for name, value in kwargs.items()}
