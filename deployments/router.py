"""The router as a deployment: the ingress of the application."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve import metrics
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse

from deployments.log_config import QUIET
from deployments.store import ServeStoreClient
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SampleResponse, SamplingParams
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group, Session, TextDelta
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.data_format.sampling_params import UNSET, Unset
from twinkle_serve.data_format.weights import PauseMode
from twinkle_serve.engines.base import Finished
from twinkle_serve.errors import EngineDeadError, TwinkleServeError
from twinkle_serve.placement import SIDE_CPUS
from twinkle_serve.routing import router as routing
from twinkle_serve.routing.templates import TemplateChoice

SWITCH_S = 0.0005
"""How long a thread of the router's process may keep the others waiting. A call passes through several threads before
it is here: with Python's 5 ms, control calls take 100 ms and more while another one's prompts are encoded."""

STALENESS = [0.5, 1.5, 2.5, 4.5, 8.5, 16.5]
"""Between whole numbers: Prometheus counts what is at a boundary as below it."""


@serve.deployment(
    name="router",
    ray_actor_options={"num_cpus": SIDE_CPUS},
    # A dead one is noticed within this period.
    health_check_period_s=1,
    # Requests queue here, where they can be counted and cancelled, not in Serve.
    max_ongoing_requests=100_000,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=5,
    max_constructor_retry_count=1,
    logging_config=QUIET,
)
class Router:
    """A `routing.Router` over handles to the engines' deployments; what it guarantees is said there."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: ServiceArgs, engines: Mapping[str, DeploymentHandle], store: DeploymentHandle
    ) -> None:
        sys.setswitchinterval(SWITCH_S)
        model = await asyncio.to_thread(hub.resolve, args.model_id, revision=args.revision, weights=False)
        links = {name: ServeEngineClient(handle) for name, handle in engines.items()}
        staleness = metrics.Histogram(
            "twinkle_sampler_staleness",
            description="Versions, of its adapter or else of the model, published between the one that sampled a "
            "request and its end.",
            boundaries=STALENESS,
            tag_keys=("adapter",),
        )
        self._router = routing.Router(
            args,
            model,
            links,
            ServeStoreClient(store),
            observe_staleness=lambda name, versions: staleness.observe(versions, tags={"adapter": name}),
        )
        await self._router.start()

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Called by Serve after `__init__`, and when the application is deployed with other engines.

        Args:
            config: `engines`, the names of their deployments.
        """
        handles = [await asyncio.to_thread(serve.get_deployment_handle, name) for name in config["engines"]]
        self._router.set_links({handle.deployment_name: ServeEngineClient(handle) for handle in handles})

    async def sample(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        num_samples: int | None = None,
        logprobs: int | Unset | None = UNSET,
        use_base_model: bool = False,
        template: TemplateChoice = None,
        timeout_s: float | None = None,
        **limits: Any,
    ) -> SampleResponse:
        """As `Sampler.sample`, by handle: `handle.sample.remote(trajectories, params, num_samples=4)`.

        Args:
            limits: the other fields of `routing.router.Call`.
        """
        return await self._router.sample(
            inputs,
            sampling_params=sampling_params,
            adapter_name=adapter_name,
            adapter_path=adapter_path,
            num_samples=num_samples,
            logprobs=logprobs,
            use_base_model=use_base_model,
            template=template,
            timeout_s=timeout_s,
            **limits,
        )

    async def sample_iter(self, inputs: Any, *args: Any, **options: Any) -> AsyncGenerator[SampleResponse, None]:
        """As `sample`, but yields responses over prompts as they finish: each prompt once, in any order."""
        async for response in self._router.sample_iter(inputs, *args, **options):
            yield response

    async def sample_stream(
        self, inputs: Any, *args: Any, **options: Any
    ) -> AsyncGenerator[tuple[str, StopReason | None], None]:
        """One sample of one prompt as (text, finish_reason), as it comes."""
        async for delta in self._router.sample_stream(inputs, *args, **options):
            yield delta

    async def cancel(self, request_id: str, inputs: Sequence[int] | None = None) -> int:
        return await self._router.cancel(request_id, inputs)

    async def renew(self, request_ids: Sequence[str], lease_s: float) -> None:
        await self._router.renew(request_ids, lease_s)

    async def add_adapter(self, name: str, source: AdapterFiles | str) -> str:
        return await self._router.add_adapter(name, source)

    async def remove_adapter(self, name: str) -> None:
        await self._router.remove_adapter(name)

    async def check_template(self, template: TemplateChoice) -> None:
        await self._router.check_template(template)

    async def begin_weights(self, label: str, mode: PauseMode) -> int:
        return await self._router.begin_weights(label, mode)

    async def append_weights(self, upload: int, index: int, bucket: Any) -> None:
        await self._router.append_weights(upload, index, bucket)

    async def publish_weights(self, upload: int, mode: PauseMode, timeout_s: float) -> str:
        return await self._router.publish_weights(upload, mode, timeout_s)

    async def abandon_weights(self, upload: int) -> None:
        await self._router.abandon_weights(upload)

    async def pause(self, mode: PauseMode, lease_s: float) -> int:
        return await self._router.pause(mode, lease_s)

    async def renew_pause(self, lease: int, lease_s: float) -> None:
        await self._router.renew_pause(lease, lease_s)

    async def resume(self, lease: int) -> None:
        await self._router.resume(lease)

    async def state_keys(self) -> list[str]:
        return await self._router.state_keys()

    async def reset_prefix_cache(self) -> None:
        await self._router.reset_prefix_cache()

    async def sleep(self, level: int = 1) -> None:
        await self._router.sleep(level)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        await self._router.wake_up(tags)

    async def drain_engine(self, name: str, timeout_s: float) -> None:
        await self._router.drain_engine(name, timeout_s)

    async def undrain_engine(self, name: str) -> None:
        await self._router.undrain_engine(name)

    async def restart_engine(self, name: str, drain_timeout_s: float, timeout_s: float) -> None:
        await self._router.restart_engine(name, drain_timeout_s, timeout_s)

    async def status(self) -> dict[str, Any]:
        return await self._router.status()

    async def purge(self) -> None:
        await self._router.purge()

    async def __call__(self, request: HTTPRequest) -> JSONResponse:
        """HTTP has no API yet; says where there is one."""
        message = 'No HTTP API here. Call serve.get_app_handle("<application>").sample.remote(...) from Ray.'
        return JSONResponse({"error": message}, status_code=501)


class ServeEngineClient:
    """An engine behind a Serve handle, as the router's `EngineClient`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def describe(self, router: str) -> EngineInfo:
        info: EngineInfo = await self._answer(self._handle.describe.remote(router))
        return info

    async def submit(self, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        # A broadcast asks the engine's only replica nothing first, as a call to one of several does, which is two
        # fifths of what that costs; and if there is none, it says so at once.
        try:
            with _our_errors():
                answers = await self._handle.broadcast("submit", session, groups, more).results_async(
                    return_exceptions=True
                )
                if all(isinstance(answer, BaseException) for answer in answers):
                    raise answers[0]
                # Where one replica takes another's place there are two, and the session is of one of them.
        except asyncio.CancelledError:  # a broadcast cannot be cancelled
            self._handle.abort.remote(session, [group.attempt for group in groups])
            raise

    def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        return self._each(self._streams.results, session)

    def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        return self._each(self._streams.stream, session, group)

    async def abort(self, session: Session, attempts: Iterable[Attempt]) -> None:
        await self._answer(self._handle.abort.remote(session, list(attempts)))

    async def control(self, method: str, *args: Any) -> Any:
        return await self._answer(self._handle.control.remote(method, *args))

    async def _answer(self, call: DeploymentResponse) -> Any:
        try:
            with _our_errors():
                return await call
        except asyncio.CancelledError:  # Serve lets a call go on that nobody waits for any more
            with suppress(Exception):
                call.cancel()
            raise

    async def _each(self, method: Any, *args: Any) -> AsyncGenerator[Any, None]:
        with _our_errors():
            items = method.remote(*args)
            try:
                async for item in items:
                    yield item
            finally:
                with suppress(Exception):  # of a call that is over
                    items.cancel()


@contextmanager
def _our_errors() -> Any:
    """Our own errors out of what Ray and Serve make of them."""
    try:
        yield
    except (RayError, RayServeException) as error:
        if isinstance(error, RayTaskError) and not isinstance(error, RayActorError):
            # An exception that the engine raised.
            if isinstance(error.cause, TwinkleServeError):
                raise error.cause from None
            raise
        raise EngineDeadError(f"{type(error).__name__}: {error}") from None
    except asyncio.CancelledError:
        # Serve makes some errors of its own CancelledError; a real cancellation of this task counts as one.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise EngineDeadError("the call was cancelled on its way") from None
