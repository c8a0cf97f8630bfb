"""A sampler whose engine runs in this process: the same router, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import copy
import functools
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.engines import build_engine, check_engine_args
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import ConfigError, EngineDeadError, EngineError, MeshError, PromptError
from twinkle_serve.placement import NodeResources, place
from twinkle_serve.routing.router import Router
from twinkle_serve.weights import LocalStore, WeightStore

ENGINE = "local"
"""Name of the engine, in `SampledSequence.engine`."""

STOP_TIMEOUT_S = 30.0
ITEMS_AHEAD = 64
"""Items that an iterator's producer may be ahead of its reader."""


class LocalBackend:
    """A router and one engine in this process."""

    def __init__(self, args: ServiceArgs) -> None:
        """Loads the model; returns when it can sample.

        Raises:
            MeshError: more than one data-parallel replica, or more devices than this machine has.
            ConfigError: as the service's own.
        """
        mesh = args.device_mesh.mesh()
        if mesh.dp_size > 1:
            raise MeshError(
                f"device_mesh.dp_size={mesh.dp_size}: one engine runs in this process. Set dp_size=1, or give "
                "remote_group, which deploys one engine a data-parallel replica."
            )
        if args.device_group is not None:
            raise ConfigError("device_group is for a service on Ray. Give remote_group instead.")
        check_engine_args(args.engine, args.engine_args)
        self._life = life = _Life()
        # Also when the last reference goes: vLLM's processes must not outlive it.
        self._end = weakref.finalize(self, life.end)
        try:
            self._router = life.run(life.start(args)).result()
        except BaseException:
            self._end()
            raise
        # Registered now, so that it runs before multiprocessing's own exit, which waits for vLLM's processes for ever.
        atexit.register(self._end)

    def _method(self, name: str, args: Any) -> Any:
        """A method of the router with its arguments, copied: a service's are pickled, and no caller's change later."""
        self._life.require()
        try:
            copied = copy.deepcopy(args)
        except Exception as error:  # whatever a caller's own class raises
            if not name.startswith("sample"):
                raise
            raise PromptError(f"inputs cannot be copied: {type(error).__name__}: {error}") from error
        return functools.partial(getattr(self._router, name), *copied)

    def call(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        future = self._life.run(self._bounded(method, self._method(method, args), timeout_s, options))
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineDeadError(SHUT_DOWN) from None
        except BaseException:
            future.cancel()
            raise

    async def call_async(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        future = self._life.run(self._bounded(method, self._method(method, args), timeout_s, options))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._end.alive:  # it is this task that was cancelled
                raise
            raise EngineDeadError(SHUT_DOWN) from None

    async def _bounded(self, name: str, method: Any, timeout_s: float | None, options: dict[str, Any]) -> Any:
        if name == "sample":  # keeps its own deadline, in its own words
            return await method(timeout_s=timeout_s, **options)
        try:
            async with asyncio.timeout(timeout_s):
                return await method(**options)
        except TimeoutError:
            raise EngineError(f"{name} did not end within {timeout_s:g} s.") from None

    def iterate(self, method: str, *args: Any, **options: Any) -> Iterator[Any]:
        return _Items(self, self._life, self._method(method, args)(**options))

    async def iterate_async(self, method: str, *args: Any, **options: Any) -> AsyncIterator[Any]:
        items = _Items(self, self._life, self._method(method, args)(**options))
        try:
            while (item := await asyncio.to_thread(items.next_or_end)) is not END:
                yield item
        finally:
            items.close()

    def put_large(self, data: Any) -> Any:
        return data

    def shutdown(self) -> None:
        self._end()


SHUT_DOWN = "the sampler was shut down. Make a new one."


class _Life:
    """An event loop in a thread, and what lives on it. It knows nothing of the backend, which may be forgotten."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sampler", daemon=True)
        self._thread.start()
        self._process = os.getpid()
        self._ended = False
        self._host: EngineServer | None = None
        self._router: Router | None = None

    def require(self) -> None:
        """Raises EngineDeadError if nothing can run here any more."""
        if self._ended:
            raise EngineDeadError(SHUT_DOWN)
        if os.getpid() != self._process:
            raise EngineDeadError("the sampler lives in the process that this one was forked from. Make one here.")

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def soon(self, callback: Any, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(callback, *args)

    async def start(self, args: ServiceArgs) -> Router:
        mesh = args.device_mesh.mesh()
        placement = place(mesh, [NodeResources(cpus=os.cpu_count() or 1, gpus=_gpus())])
        model = await asyncio.to_thread(hub.resolve, args.model_id, revision=args.revision)
        # One core a device is what tensor parallelism needs on CPU; else the engine shares this process's cores.
        bound = placement.device == "cpu" and mesh.devices_per_replica > 1
        cores = sorted(os.sched_getaffinity(0))[: mesh.devices_per_replica] if bound else []
        engine = build_engine(
            args.engine,
            ENGINE,
            str(model),
            args.engine_args,
            device=placement.device,
            tp_size=mesh.tp_size,
            pp_size=mesh.pp_size,
            executor="mp",
            cpus=[(core,) for core in cores],
            devices_on_node=mesh.devices_per_replica,
            trust_remote_code=args.trust_remote_code,
        )
        store = LocalStore(WeightStore(args.model_id, args.state_dir))
        self._host = EngineServer(engine, model, store)
        await self._host.start(ENGINE, args.startup_timeout_s)
        self._router = Router(args, model, {ENGINE: self._host}, store, engines_return=False)
        await self._router.start()
        return self._router

    def end(self) -> None:
        """Stops the engine and the loop. Calls that are running raise."""
        self._ended = True
        if os.getpid() != self._process:
            return
        if threading.current_thread() is self._thread:  # collected there: a loop cannot wait for itself
            threading.Thread(target=self.end, daemon=True).start()
            return
        try:
            with contextlib.suppress(TimeoutError):
                self.run(self._stop()).result(STOP_TIMEOUT_S)
        finally:
            self.soon(self._loop.stop)
            self._thread.join(STOP_TIMEOUT_S)
            if not self._thread.is_alive():
                self._loop.close()

    async def _stop(self) -> None:
        if self._router is not None:
            self._router.close()
        if self._host is not None:
            await self._host.stop()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def _gpus() -> int:
    """GPUs that this process sees, without loading torch where there is none."""
    if not Path("/dev/nvidia0").exists():
        return 0
    import torch

    return int(torch.cuda.device_count())


END = object()


class _Items:
    """Items of an async generator on the sampler's loop, for a reader in another thread.

    One task runs the generator from beginning to end, begins at once, and waits while it is ITEMS_AHEAD. It is
    cancelled when the reader closes this or forgets it. What has arrived is read in order, whatever came after it.
    """

    def __init__(self, backend: LocalBackend, life: _Life, items: AsyncGenerator[Any, None]) -> None:
        self._backend = backend  # which must not be collected while this is read
        self._life = life
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(ITEMS_AHEAD)
        self._ended = False
        self._future = life.run(_drain(items, self._arrived, self._room))
        weakref.finalize(self, self._future.cancel)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = self.next_or_end()
        if item is END:
            raise StopIteration
        return item

    def next_or_end(self) -> Any:
        """The next item, or END; raises what ended the generator."""
        if self._ended:
            return END
        item = self._arrived.get()
        if item is END or isinstance(item, _Raised):
            self._ended = True
            if isinstance(item, _Raised):
                raise item.error
            return END
        self._life.soon(self._room.release)
        return item

    def close(self) -> None:
        """Cancels the call; it aborts what it had running."""
        self._ended = True
        self._future.cancel()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _drain(items: AsyncGenerator[Any, None], arrived: queue.SimpleQueue[Any], room: asyncio.Semaphore) -> None:
    try:
        async with contextlib.aclosing(items):
            async for item in items:
                await room.acquire()
                arrived.put(item)
        arrived.put(END)
    except asyncio.CancelledError:
        arrived.put(_Raised(EngineDeadError(SHUT_DOWN)))
        raise
    except BaseException as error:
        arrived.put(_Raised(error))
