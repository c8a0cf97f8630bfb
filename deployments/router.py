"""The router: admits requests, sends groups to engines, gathers samples. The ingress of the application."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import random
from collections.abc import AsyncIterator, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse

from deployments.logging import QUIET
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SampleResponse, SamplingParams
from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.engines.base import Finished, check_fits
from twinkle_serve.errors import (
    AdapterError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    RequestError,
    SamplingParamsError,
    TwinkleServeError,
)
from twinkle_serve.placement import SIDE_CPUS
from twinkle_serve.routing.dispatch import Dispatcher
from twinkle_serve.routing.request import Request, ResponseHeader
from twinkle_serve.routing.seeds import SPACING
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import Prompt, encode_inputs

logger = logging.getLogger("ray.serve")

MOST_ENGINES_LOST = 2
"""Engines after which a group fails: it may be what kills them."""

PROBE_PERIOD_S = 2.0
PROBE_TIMEOUT_S = 15.0
"""An engine that does not answer for so long is lost. Serve itself keeps a call to a dead one until it is replaced."""


@serve.deployment(
    name="router",
    ray_actor_options={"num_cpus": SIDE_CPUS},
    # Requests queue here, where they can be counted and cancelled, not in Serve.
    max_ongoing_requests=100_000,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=5,
    max_constructor_retry_count=1,
    logging_config=QUIET,
)
class Router:
    """Sends prompts to engines and gathers what they sampled.

    Guarantees: every accepted prompt yields exactly `num_samples` sequences, or the call raises.
    Guarantees: cancelling the call, or its deadline, aborts its sequences in the engines.
    Guarantees: a group whose engine dies is sampled elsewhere, with its seed; one that loses MOST_ENGINES_LOST fails.
    Does not guarantee: the order in which prompts finish.
    Does not guarantee: that a request survives this process.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: ServiceArgs, engines: Mapping[str, DeploymentHandle]
    ) -> None:
        self._args = args
        self._handles = dict(engines)
        self._streams = {name: handle.options(stream=True) for name, handle in engines.items()}
        model = await asyncio.to_thread(hub.resolve, args.model_id, weights=False)
        self._template = await asyncio.to_thread(Template, model, trust_remote_code=args.trust_remote_code)
        self._info: EngineInfo | None = None
        self._has_info = asyncio.Event()
        self._dispatcher = Dispatcher()
        # At random, so that it meets no group of a router that this one replaces.
        self._group_ids = itertools.count(random.getrandbits(40) << 20)
        # One thread: tokenizers are not safe in several, and the event loop must not wait for them.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._requests: dict[int, Request] = {}
        """Live requests, by group id."""
        self._uses: dict[str, _Use] = {}
        """Engines in use, the same as the dispatcher's."""
        self._pump_due = False
        self._tasks: set[asyncio.Task[None]] = set()
        for name in self._handles:
            self._spawn(self._follow_engine(name))

    # -- calls -----------------------------------------------------------------------------------

    async def sample(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        *,
        num_samples: int | None = None,
        timeout_s: float | None = None,
    ) -> SampleResponse:
        """Samples each input `num_samples` times.

        Args:
            inputs: a Trajectory or InputFeature, or a list of either kind.
            adapter_name: LoRA adapter to sample with; "" is the base model.
            timeout_s: deadline of the call, queueing included; None is the config's request_timeout_s.

        Returns:
            A response whose `sequences` are flat and prompt-major.

        Raises:
            RequestError: the call cannot be served as it is.
            DeadlineError: it took longer than `timeout_s`.
            EngineError: an engine failed, and so did moving its work.
        """
        async with self._admitted(inputs, sampling_params, adapter_name, num_samples, timeout_s) as request:
            return await request.response()

    async def sample_iter(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        *,
        num_samples: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[SampleResponse]:
        """As `sample`, but yields responses over prompts as they finish: each prompt once, in any order."""
        async with self._admitted(inputs, sampling_params, adapter_name, num_samples, timeout_s) as request:
            async for response in request.prompts_as_they_finish():
                yield response

    async def status(self) -> dict[str, Any]:
        """Engines and queues, as plain values."""
        return {
            "model_id": self._args.model_id,
            "engines": {
                name: {
                    "state": "ready",
                    "sequences": self._dispatcher.sequences(name),
                    "engine": use.info.kind,
                    "device": use.info.device,
                    "cpus": list(use.info.cpus),
                }
                if (use := self._uses.get(name)) is not None
                else {"state": "starting", "sequences": 0}
                for name in self._handles
            },
            "requests": len({id(request) for request in self._requests.values()}),
            "groups_waiting": self._dispatcher.waiting,
        }

    async def __call__(self, request: HTTPRequest) -> JSONResponse:
        """HTTP has no API yet; says where there is one."""
        message = 'No HTTP API here. Call serve.get_app_handle("<application>").sample.remote(...) from Ray.'
        return JSONResponse({"error": message}, status_code=501)

    # -- admission -------------------------------------------------------------------------------

    @asynccontextmanager
    async def _admitted(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None,
        adapter_name: str,
        num_samples: int | None,
        timeout_s: float | None,
    ) -> AsyncIterator[Request]:
        """A request whose groups are on their way; whatever is left of it at the end is aborted."""
        limit_s = self._args.request_timeout_s if timeout_s is None else _deadline(timeout_s)
        request: Request | None = None
        try:
            async with asyncio.timeout(limit_s):
                params = SamplingParams.of(sampling_params, num_samples)
                self._check(params, adapter_name)
                loop = asyncio.get_running_loop()
                prompts = await loop.run_in_executor(self._encoding, encode_inputs, inputs, self._template)
                await self._has_info.wait()
                request = self._admit(prompts, params)
                yield request
        except TimeoutError:
            raise DeadlineError(self._late(limit_s, request)) from None
        finally:
            if request is not None:
                self._dismiss(request)

    def _check(self, params: SamplingParams, adapter_name: str) -> None:
        if adapter_name:
            raise AdapterError(
                f"unknown adapter {adapter_name!r}: this service has no LoRA adapters. Leave adapter_name out."
            )
        if params.num_samples > SPACING:
            raise SamplingParamsError(f"num_samples must be at most {SPACING}, got {params.num_samples}.")

    def _admit(self, prompts: list[Prompt], params: SamplingParams) -> Request:
        assert self._info is not None
        for i, prompt in enumerate(prompts):
            check_fits(self._info, prompt.ids, params, f"inputs[{i}]")
        first_id = next(self._group_ids)
        for _ in prompts[1:]:
            next(self._group_ids)
        header = ResponseHeader(logprobs_mode=self._info.logprobs_mode, special_tokens=self._template.special_tokens)
        request = Request(first_id, prompts, params, header)
        self._requests.update(dict.fromkeys(request.ids, request))
        self._dispatcher.enqueue(request.groups())
        self._pump_soon()
        return request

    def _dismiss(self, request: Request) -> None:
        for group_id in request.ids:
            self._requests.pop(group_id, None)
        if not request.samples_missing:
            return
        for name, groups in self._dispatcher.withdraw(request.ids).items():
            self._spawn(self._abort(name, self._uses[name], groups))
        self._pump_soon()  # it may have stood in the way of others

    def _late(self, limit_s: float, request: Request | None) -> str:
        ready = len(self._dispatcher.engines)
        if request is None:
            state = "no engine was ready"
        else:
            done = request.samples_wanted - request.samples_missing
            state = f"{done} of {request.samples_wanted} samples were done"
        return (
            f"timeout_s={limit_s:g} passed when {state}; {ready} of {len(self._handles)} engines are up. "
            "Raise timeout_s, or send less in a call."
        )

    # -- dispatch --------------------------------------------------------------------------------

    def _pump_soon(self) -> None:
        """Sends what can be sent at the next turn of the loop: calls that arrive together share a chunk."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        for name, groups in self._dispatcher.assign().items():
            self._spawn(self._run_chunk(name, self._uses[name], groups))

    async def _run_chunk(self, name: str, use: _Use, groups: list[Group]) -> None:
        """Has an engine sample a chunk. Every group of it is delivered, failed, or put back into the queue.

        Once the engine is out of that use, all its groups are placed elsewhere, and what still comes is dropped.
        """
        try:
            stream = self._streams[name].sample.remote(use.info.life, groups)
            async for finished in stream:
                if self._uses.get(name) is not use:
                    stream.cancel()
                    return
                self._deliver(name, finished)
        except Exception as error:
            if self._uses.get(name) is not use:
                return
            if _is_death(error):
                self._lose(name, error)
            else:
                # A bug, here or there: these groups fail, the engine stays.
                logger.exception(f"{name} failed on a chunk of {len(groups)} groups")
                for group in self._dispatcher.finish(name, [group.key for group in groups]):
                    self._fail(group.id, EngineError(f"{name} failed on a chunk of {len(groups)} groups: {error!r}"))
        finally:
            if self._uses.get(name) is use:
                self._sample_again(name, self._dispatcher.finish(name, [group.key for group in groups]))
            self._pump_soon()

    def _deliver(self, name: str, finished: Finished) -> None:
        for group in self._dispatcher.finish(name, finished.failures):
            self._fail(group.id, finished.failures[group.key])
        if (columns := finished.columns) is None:
            return
        group_ids = columns.group.tolist()
        self._dispatcher.finish(name, zip(group_ids, columns.sample.tolist(), strict=True))
        present = set(group_ids)
        by_request: dict[Request, set[int]] = {}
        for group_id in present & self._requests.keys():
            by_request.setdefault(self._requests[group_id], set()).add(group_id)
        for request, ids in by_request.items():
            try:
                request.add(columns if ids == present else columns.without(present - ids))
            except (
                Exception
            ) as error:  # a bug of ours; the other requests of this item have their samples still to come
                logger.exception("samples could not be handed to their request")
                request.fail(EngineError(f"a bug in the router: {error!r}"))
        self._pump_soon()

    def _fail(self, group_id: int, error: TwinkleServeError) -> None:
        if (request := self._requests.get(group_id)) is not None:
            request.fail(error)

    def _sample_again(self, name: str, lost: list[Group]) -> None:
        """Puts groups that an engine did not finish back into the queue, once each."""
        again = []
        for group in lost:
            if group.id not in self._requests:
                continue
            if group.engines_lost + 1 >= MOST_ENGINES_LOST:
                self._fail(
                    group.id,
                    EngineDeadError(f"a prompt lost {MOST_ENGINES_LOST} engines in turn, the last one {name}."),
                )
            else:
                again.append(replace(group, engines_lost=group.engines_lost + 1))
        self._dispatcher.enqueue(again, first=True)

    # -- engines ---------------------------------------------------------------------------------

    async def _follow_engine(self, name: str) -> None:
        """Keeps an engine in use for as long as it answers; sees restarts, and deaths while it has no work."""
        while True:
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    info: EngineInfo = await self._handles[name].describe.remote()
            # Whatever it is, an engine that does not answer is not used. (Serve makes some errors CancelledError.)
            except (Exception, asyncio.CancelledError) as error:
                self._lose(name, error)
            else:
                if (use := self._uses.get(name)) is not None and use.info.life != info.life:
                    self._lose(name, EngineDeadError("it was restarted"))
                if name not in self._uses:
                    self._uses[name] = _Use(info)
                    self._info = self._info or info
                    self._has_info.set()
                    self._dispatcher.add_engine(name, info.max_num_seqs)
                    self._pump_soon()
            await asyncio.sleep(PROBE_PERIOD_S)

    def _lose(self, name: str, error: BaseException) -> None:
        """Takes an engine out of use: its groups go elsewhere. It is used again once it answers."""
        use = self._uses.pop(name, None)
        if use is None:
            return
        lost = self._dispatcher.remove_engine(name)
        logger.warning(f"{name} is lost with {len(lost)} groups, to be sampled elsewhere: {type(error).__name__}")
        # It may be slow and not dead.
        self._spawn(self._abort(name, use, lost))
        self._sample_again(name, lost)
        self._pump_soon()

    async def _abort(self, name: str, use: _Use, groups: list[Group]) -> None:
        """Has an engine drop groups, and releases the load that they were, if it is still the same use of it."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._handles[name].abort.remote([group.attempt for group in groups])
        except (Exception, asyncio.CancelledError) as error:  # a lost engine has nothing to abort
            logger.info(f"{name} did not take an abort of {len(groups)} groups: {type(error).__name__}")
        if self._uses.get(name) is use:
            self._dispatcher.finish(name, [group.key for group in groups])
            self._pump_soon()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine that is of no request.

        In an empty context: a task that inherited a request's would pass for its child at Ray and at Serve, and be
        cancelled with it.
        """
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        # The loop holds tasks weakly; the set keeps them from being collected halfway.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass(frozen=True, eq=False, slots=True)
class _Use:
    """An engine from when it answered until it is lost."""

    info: EngineInfo


def _is_death(error: Exception) -> bool:
    """Whether an engine's process, or vLLM's in it, is gone. Another exception that it raised is a RayTaskError."""
    if isinstance(error, (EngineDeadError, RayActorError, RayServeException)):
        return True
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _deadline(timeout_s: float) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < float("inf"):
        raise RequestError(f"timeout_s must be a number of seconds above 0, got {timeout_s!r}.")
    return float(timeout_s)
