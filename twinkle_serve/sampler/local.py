"""A sampler whose engine runs in this process: the same router, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import copy
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs, traces_of
from twinkle_serve.cores import CoreClaims
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_request import Inputs, SampleRequest
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.engines import build_engine, check_engine_args
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import ConfigError, DeadlineError, MeshError, PromptError
from twinkle_serve.placement import NodeResources, place
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.routing.router import Router
from twinkle_serve.sampler.loop_thread import LoopThread
from twinkle_serve.sampler.router_client import BucketSender, RouterClient
from twinkle_serve.weights import LocalStore, StateLock, WeightStore

P = ParamSpec("P")
T = TypeVar("T")

ENGINE = "local"
"""Name of the engine, in `SampledSequence.engine`."""

STOP_TIMEOUT_S = 30.0


class LocalClient(RouterClient):
    """A router and one engine in this process."""

    def __init__(self, args: ServiceArgs) -> None:
        """Loads the model; returns when it is ready.

        Raises:
            MeshError: more than one data-parallel replica, or more devices than this machine has.
            ConfigError: as of the service.
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
        self._service = service = _Service()
        self.loop = service.loop
        # Also when the last reference goes: vLLM's processes must not outlive it.
        self._end = weakref.finalize(self, service.end)
        try:
            self._router = self.loop.call(service.start(args))
        except BaseException:
            self._end()
            raise
        # Registered now, so that it runs before multiprocessing's own exit, which waits forever for vLLM's processes.
        atexit.register(self._end)

    def snapshot(self, inputs: Inputs) -> Inputs:
        self.loop.require_running()
        try:
            return copy.deepcopy(inputs)
        except Exception as error:  # raised by a class of the caller's
            raise PromptError(f"inputs cannot be copied: {type(error).__name__}: {error}") from error

    def prepare(self, request: SampleRequest) -> SampleRequest:
        return replace(request, inputs=self.snapshot(request.inputs))

    # These are coroutines and generators of their own, not the router's: a running call keeps this client alive.

    async def run(self, request: SampleRequest) -> SampleResponse:
        return await self._router.run(request)

    async def run_iter(self, request: SampleRequest) -> AsyncGenerator[SampleResponse, None]:
        async with contextlib.aclosing(self._router.run_iter(request)) as responses:
            async for response in responses:
                yield response

    async def run_updates(self, request: SampleRequest) -> AsyncGenerator[UpdatesItem, None]:
        async with contextlib.aclosing(self._router.run_updates(request)) as items:
            async for item in items:
                yield item

    async def run_stream(self, request: SampleRequest) -> AsyncGenerator[tuple[str, StopReason | None], None]:
        async with contextlib.aclosing(self._router.run_stream(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def call(
        self,
        timeout_s: float,
        method: Callable[Concatenate[RouterAPI, P], Awaitable[T]],
        *args: P.args,
        **options: P.kwargs,
    ) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                answer: T = await getattr(self._router, method.__name__)(*args, **options)
                return answer
        except TimeoutError:
            raise DeadlineError(
                f"{method.__name__} did not end within {timeout_s:g} s. Allow it more time, or send it again."
            ) from None

    async def cancel(self, request_id: str, inputs: list[int] | None) -> int:
        return await self._router.cancel(request_id, inputs)

    def sending(self) -> contextlib.AbstractContextManager[BucketSender]:
        return contextlib.nullcontext(BucketSender())

    def shutdown(self, *, force: bool = False) -> None:
        self._end()


class _Service:
    """Store, engine and router on an event loop. It does not refer to its client, which may be collected."""

    def __init__(self) -> None:
        self.loop = LoopThread("sampler")
        self._server: EngineServer | None = None
        self._router: Router | None = None
        self._state_lock: StateLock | None = None
        self._claims = CoreClaims()
        self._ended = threading.Event()

    async def start(self, args: ServiceArgs) -> Router:
        mesh = args.device_mesh.mesh()
        placement = place(mesh, [NodeResources(cpus=os.cpu_count() or 1, gpus=_gpus())])
        model = await asyncio.to_thread(hub.resolve, args.model_id, revision=args.revision)
        # Tensor parallelism on CPU needs one core per device; otherwise the engine shares this process's cores.
        bound = placement.device == "cpu" and mesh.devices_per_replica > 1
        allowed = sorted(os.sched_getaffinity(0))
        wanted = [(core,) for core in allowed[: mesh.devices_per_replica]] if bound else []
        cores = self._claims.take(wanted, allowed) if wanted else []
        engine = build_engine(
            args.engine,
            ENGINE,
            str(model),
            args.engine_args,
            device=placement.device,
            tp_size=mesh.tp_size,
            pp_size=mesh.pp_size,
            executor="mp",
            cpus=cores,
            devices_on_node=mesh.devices_per_replica,
            trust_remote_code=args.trust_remote_code,
        )
        if args.state_dir is not None:
            self._state_lock = await asyncio.to_thread(StateLock, args.state_dir)
        store = LocalStore(WeightStore(args.model_id, args.state_dir, args.weights_versions))
        track = args.track_names[0]
        self._server = EngineServer(engine, model, store, traces_of(args.traces, "engine"), track=track)
        await self._server.start(ENGINE, args.startup_timeout_s)
        router = Router(
            args, model, {ENGINE: self._server}, store, engines_return=False, traces=traces_of(args.traces, "router")
        )
        await router.start()
        self._router = router
        return router

    def end(self) -> None:
        """Stops the engine and the loop. Running calls raise EngineDeadError."""
        self.loop.refuse_calls()
        if not self.loop.in_own_process:
            return
        if threading.current_thread() is self.loop.thread:  # collected there: a loop cannot wait for itself
            threading.Thread(target=self.end, daemon=True).start()
            return
        try:
            stopping = self.loop.start(self._stop())
            self._end_loop()
        except KeyboardInterrupt:  # it is the caller's: the engine ends all the same
            threading.Thread(target=self._end_loop, daemon=True).start()
            raise
        if stopping.done():
            stopping.result()

    def _end_loop(self) -> None:
        """Stops the loop once the engine has ended."""
        self._ended.wait(STOP_TIMEOUT_S)
        self.loop.stop(STOP_TIMEOUT_S)

    async def _stop(self) -> None:
        try:
            await self._stop_parts()
        finally:
            self._ended.set()

    async def _stop_parts(self) -> None:
        if self._router is not None:
            self._router.close()
        if self._server is not None:
            await self._server.stop()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        self._claims.close()
        if self._state_lock is not None:
            self._state_lock.release()


def _gpus() -> int:
    """Returns the number of GPUs of this process, without loading torch where there is none."""
    if not Path("/dev/nvidia0").exists():
        return 0
    import torch

    return int(torch.cuda.device_count())
