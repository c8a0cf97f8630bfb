"""Runs work with tokenizers, one piece at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class EncodingThread:
    """Runs functions in one thread, for tokenizers are not thread-safe and the event loop must not wait for them.

    A short function runs at once if the thread is idle: the way to the thread and back takes 0.1 ms, and more beside
    busy threads.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._latest: Future[Any] | None = None

    async def run(self, short: bool, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Runs a function; `short` says that it takes less than about a millisecond."""
        if short and (self._latest is None or self._latest.done()):
            return function(*args, **options)
        self._latest = latest = self._executor.submit(partial(function, *args, **options))
        return await asyncio.wrap_future(latest)

    def close(self) -> None:
        """Drops work that waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)
