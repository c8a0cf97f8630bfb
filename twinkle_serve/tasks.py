"""Tasks of an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, NoReturn, TypeAlias, TypeVar

T = TypeVar("T")

Call: TypeAlias = Coroutine[Any, Any, T]
"""A coroutine that returns T."""


def deferred(make: Callable[[], Call[T]]) -> Call[T]:
    """Makes a coroutine now. If that fails, the error is raised when it is awaited."""
    try:
        return make()
    except Exception as error:
        return _failed(error)


async def _failed(error: Exception) -> NoReturn:
    raise error


async def one_ahead(items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yields the same items, making the next one while the last one is in use."""
    async with contextlib.aclosing(items):
        following = asyncio.ensure_future(anext(items, None))
        try:
            while (item := await following) is not None:
                following = asyncio.ensure_future(anext(items, None))
                yield item
        finally:
            following.cancel()
            await asyncio.wait({following})


def is_cancelled() -> bool:
    """Whether the running task was cancelled. Serve and futures raise CancelledError for errors of their own too."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class BackgroundTasks:
    """Runs coroutines that belong to no request until they end or `cancel` is called."""

    def __init__(self) -> None:
        # The event loop holds tasks weakly; the set keeps them from being collected halfway.
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, coroutine: Call[T]) -> asyncio.Task[T]:
        """Starts a coroutine on the running event loop.

        Its context is empty: Serve takes a task with a request's context for a child of the request, and cancels both
        together.
        """
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def cancel(self) -> None:
        """Cancels all tasks."""
        for task in self._tasks:
            task.cancel()
