"""An event loop in a thread: the one bridge between blocking callers and async code."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Generic, TypeVar

from twinkle_serve import tasks
from twinkle_serve.errors import EngineDeadError
from twinkle_serve.tasks import Call

T = TypeVar("T")

ITEMS_AHEAD = 64
"""Items that the producer of an iterator may be ahead of its reader."""

CLOSE_S = 5.0
"""Limit to closing an async iterator, whose loop may be stopped meanwhile, and to ending what runs on a loop."""

SHUT_DOWN = "the sampler was shut down. Make a new one."


class LoopThread:
    """Runs coroutines on an event loop in a daemon thread, for callers in any other thread.

    Guarantees:
        A caller that stops waiting cancels its coroutine.
        After `stop`, running and later calls raise EngineDeadError.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._stopped = self._ended = False
        self._ending = threading.Lock()
        """Held while a coroutine is handed over, and while `_ended` is set."""
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        with self._ending:
            self._ended = True
        self._loop.run_until_complete(_cancel_others())
        self._loop.close()

    def require_running(self) -> None:
        """Raises EngineDeadError if nothing can run here any more."""
        if self._stopped:
            raise EngineDeadError(SHUT_DOWN)
        self.require_own_process()

    def require_own_process(self) -> None:
        """Raises EngineDeadError in a process that was forked from the one with the thread: nothing runs there."""
        if not self.in_own_process:
            raise EngineDeadError("the sampler lives in the process that this one was forked from. Make one here.")

    @property
    def in_own_process(self) -> bool:
        """False in a process that was forked from the one with the thread."""
        return os.getpid() == self._process

    def start(self, coroutine: Call[T]) -> concurrent.futures.Future[T]:
        """Starts a coroutine and returns its future. Raises EngineDeadError if the loop has ended."""
        with self._ending:
            if not self._ended:
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()  # or Python warns that it was never awaited
        raise EngineDeadError(SHUT_DOWN)

    def call(self, coroutine: Call[T]) -> T:
        """Runs a coroutine and blocks until it ends."""
        self._require_or_close(coroutine)
        return self.wait(self.start(coroutine))

    def wait(self, future: concurrent.futures.Future[T]) -> T:
        """Blocks until a started coroutine ends."""
        self.require_own_process()
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineDeadError(SHUT_DOWN) from None
        except BaseException:
            future.cancel()
            raise

    async def call_async(self, coroutine: Call[T]) -> T:
        """Runs a coroutine and awaits it on the caller's own event loop."""
        self._require_or_close(coroutine)
        try:
            return await asyncio.wrap_future(self.start(coroutine))
        except asyncio.CancelledError:
            if tasks.is_cancelled():
                raise
            raise EngineDeadError(SHUT_DOWN) from None

    def iterate(self, items: AsyncGenerator[T, None]) -> Items[T]:
        """Starts an async generator and returns its items as a blocking iterator."""
        self.require_running()
        return Items(self, items)

    async def iterate_async(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yields the items of an async generator, which runs here, on the caller's own event loop."""
        self.require_running()
        try:
            while (item := await self.call_async(_next_of(items))) is not None:
                yield item.value
        finally:
            await self._close(items)

    async def _close(self, items: AsyncGenerator[T, None]) -> None:
        """Closes an async generator that runs here, and waits until it has ended what it runs."""
        if not self._stopped and self.in_own_process:
            await asyncio.wait([asyncio.wrap_future(self.start(_close(items)))], timeout=CLOSE_S)

    def cancel(self, future: concurrent.futures.Future[T]) -> None:
        """Cancels a started coroutine; does nothing in a forked process, where it does not run."""
        if self.in_own_process:
            future.cancel()

    def soon(self, callback: Callable[[], object]) -> None:
        """Calls back on the loop; does nothing once it has ended, or in a forked process."""
        if not self.in_own_process:
            return
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def refuse_calls(self) -> None:
        """Makes later calls raise, ahead of `stop`."""
        self._stopped = True

    def stop(self, timeout_s: float) -> None:
        """Stops the loop, cancels what still runs, and waits for the thread."""
        self._stopped = True
        self.soon(self._loop.stop)
        self.thread.join(timeout_s)

    def _require_or_close(self, coroutine: Call[T]) -> None:
        try:
            self.require_running()
        except BaseException:
            coroutine.close()  # or Python warns that it was never awaited
            raise


async def _cancel_others() -> None:
    """Ends what runs on this loop, or is about to: nothing else would."""
    await asyncio.sleep(0)  # coroutines that were handed over begin
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=CLOSE_S)


class Items(Iterator[T], Generic[T]):
    """Items of an async generator that runs on a `LoopThread`, for a reader in another thread.

    One task runs the generator from start to end. It starts at once, waits while it is ITEMS_AHEAD, and is cancelled
    when the reader closes this or drops it. Items that have arrived are read in order, before any error.
    """

    def __init__(self, loop: LoopThread, items: AsyncGenerator[T, None]) -> None:
        self._loop = loop
        self._arrived: queue.SimpleQueue[_Item[T] | _End] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(ITEMS_AHEAD)
        self._ended = False
        self._future = loop.start(_drain(items, self._arrived, self._room))
        weakref.finalize(self, loop.cancel, self._future)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._next()
        if item is None:
            raise StopIteration
        return item.value

    def _next(self) -> _Item[T] | None:
        if self._ended:
            return None
        self._loop.require_own_process()
        try:
            item = self._arrived.get()
        except BaseException:  # Ctrl-C; a traceback that is kept would keep the call running
            self.close()
            raise
        if isinstance(item, _Item):
            self._loop.soon(self._room.release)
            return item
        self._ended = True
        if item.error is not None:
            raise item.error
        return None

    def close(self) -> None:
        """Cancels the generator; its call aborts everything that it runs."""
        self._ended = True
        self._loop.cancel(self._future)


class _Item(Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value


class _End:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


async def _next_of(items: AsyncGenerator[T, None]) -> _Item[T] | None:
    async for item in items:
        return _Item(item)
    return None


async def _close(items: AsyncGenerator[T, None]) -> None:
    with contextlib.suppress(RuntimeError):  # a cancelled step may be ending it at this moment
        await items.aclose()


async def _drain(
    items: AsyncGenerator[T, None], arrived: queue.SimpleQueue[_Item[T] | _End], room: asyncio.Semaphore
) -> None:
    try:
        async with contextlib.aclosing(items):
            async for item in items:
                await room.acquire()
                arrived.put(_Item(item))
        arrived.put(_End())
    except asyncio.CancelledError:
        arrived.put(_End(EngineDeadError(SHUT_DOWN)))
        raise
    except BaseException as error:
        arrived.put(_End(error))


@functools.cache
def _service_loop(process: int) -> LoopThread:
    return LoopThread("twinkle-serve")


def service_loop() -> LoopThread:
    """Returns the loop of this process that all clients of services share."""
    return _service_loop(os.getpid())
