"""Calls a running service from any process of its Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from twinkle_serve.data_format import SampleResponse, SamplingParams
from twinkle_serve.errors import EngineError, ServiceNotReadyError, TwinkleServeError, unknown_name

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
    from ray.serve.schema import ApplicationStatusOverview

GRACE_S = 10.0
"""The router keeps deadlines; where a call names one, `sample` waits this much longer before it takes the router for
gone. A router that dies ends every call; one that cannot be replaced is seen only by this."""


def connect(name: str = "sampler", *, timeout_s: float = 180.0) -> ServiceSampler:
    """The sampler of a running application.

    Joins the Ray cluster if this process is in none: RAY_ADDRESS, or the one on this machine.

    Args:
        name: of the application in the config.
        timeout_s: how long to wait for one that is still starting.

    Raises:
        ServiceNotReadyError: no cluster, no such application, one that failed, or one that did not start in time.
    """
    if not ray.is_initialized():
        try:
            ray.init(address="auto", namespace="serve", log_to_driver=False, logging_level="warning")
        except ConnectionError as error:
            raise ServiceNotReadyError(
                "no Ray cluster to connect to: RAY_ADDRESS is not set and none runs on this machine. "
                "Start the service with scripts/serve."
            ) from error
    _wait_until_running(name, timeout_s)
    return ServiceSampler(serve.get_app_handle(name), name)


def _wait_until_running(name: str, timeout_s: float) -> None:
    """A handle to an application that failed would wait for ever, so its state is asked first."""
    deadline = time.monotonic() + timeout_s
    while True:
        applications = serve.status().applications
        if name not in applications:
            raise ServiceNotReadyError(unknown_name("application", name, applications) + ".")
        application = applications[name]
        state = str(application.status.value)
        # UNHEALTHY while an engine is being replaced: the router samples on the others.
        router = application.deployments.get("router")
        if state == "RUNNING" or (state == "UNHEALTHY" and router is not None and router.status == "HEALTHY"):
            return
        if state in ("DEPLOY_FAILED", "DELETING"):
            raise ServiceNotReadyError(f"application {name!r} is {state}: {failure_reason(application)}")
        if time.monotonic() > deadline:
            raise ServiceNotReadyError(
                f"application {name!r} is still {state} after timeout_s={timeout_s:g}. Raise timeout_s, or see its "
                "deployments with `serve status`."
            )
        time.sleep(0.2)


def failure_reason(application: ApplicationStatusOverview) -> str:
    """The error of ours that an application's status quotes in a traceback, or all that it says."""
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    for message in messages:
        if found := re.findall(r"^(?:\w+\.)*(\w+Error: .+)$", message, re.MULTILINE):
            return str(found[-1])
    return "\n".join(filter(None, messages))


class ServiceSampler:
    """Samples on a running service; the calls of the Sampler interface.

    Guarantees: a call returns every sample that it asked for, or raises a TwinkleServeError.
    Guarantees: an abandoned iterator or a cancelled coroutine is cancelled in the service.
    """

    def __init__(self, handle: DeploymentHandle, name: str) -> None:
        self._handle = handle
        self._name = name

    def sample(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        *,
        num_samples: int | None = None,
        timeout_s: float | None = None,
    ) -> SampleResponse:
        """Samples each input `num_samples` times. Not for async code: there, `sample_async`.

        Args:
            inputs: a Trajectory or InputFeature, or a list of either kind.
            sampling_params: SamplingParams or a dict of the same keys.
            adapter_name: LoRA adapter to sample with; "" is the base model.
            num_samples: samples of each prompt; None takes it from sampling_params.
            timeout_s: deadline of the call, queueing included; None is the config's request_timeout_s.

        Raises:
            RequestError: the call cannot be served as it is.
            DeadlineError: it took longer than `timeout_s`.
            EngineError: engines, or the router, failed.
        """
        response = self._call(inputs, sampling_params, adapter_name, num_samples, timeout_s)
        try:
            result: SampleResponse = response.result(timeout_s=_patience_s(timeout_s))
        except BaseException as error:
            _cancel(response)
            raise self._translated(error) from None
        return result

    async def sample_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        *,
        num_samples: int | None = None,
        timeout_s: float | None = None,
    ) -> SampleResponse:
        """As `sample`, for async code: an async actor, or `asyncio.run`."""
        response = self._call(inputs, sampling_params, adapter_name, num_samples, timeout_s)
        try:
            async with asyncio.timeout(_patience_s(timeout_s)):
                result: SampleResponse = await response
        except BaseException as error:
            _cancel(response)
            raise self._translated(error) from None
        return result

    def sample_iter(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        *,
        num_samples: int | None = None,
        timeout_s: float | None = None,
        progress: bool = False,
    ) -> Iterator[SampleResponse]:
        """Yields the response to each prompt as it finishes, in any order; `prompt_index` says which it is.

        The call is sent at once; what is wrong with it is raised by the first `next`.

        Args:
            progress: show a progress bar on the terminal.
        """
        stream = self._stream(inputs, sampling_params, adapter_name, num_samples, timeout_s)
        total = len(inputs) if isinstance(inputs, Sequence) else 1
        responses = self._each(stream, _ProgressBar(total, show=progress))
        weakref.finalize(responses, _cancel, stream)  # a generator that was never started runs no `finally`
        return responses

    def _each(self, stream: DeploymentResponseGenerator, bar: _ProgressBar) -> Iterator[SampleResponse]:
        try:
            with bar:
                for part in stream:
                    for response in part:
                        bar.advance()
                        yield response
        except Exception as error:
            raise self._translated(error) from None
        finally:
            _cancel(stream)

    async def sample_iter_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        *,
        num_samples: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[SampleResponse]:
        """As `sample_iter`, for async code."""
        stream = self._stream(inputs, sampling_params, adapter_name, num_samples, timeout_s)
        try:
            async for part in stream:
                for response in part:
                    yield response
        except Exception as error:
            raise self._translated(error) from None
        finally:
            _cancel(stream)

    def status(self) -> dict[str, Any]:
        """Engines and queues of the service, as plain values."""
        status: dict[str, Any] = self._handle.status.remote().result(timeout_s=GRACE_S)
        return status

    def _call(
        self, inputs: Any, params: Any, adapter_name: str, num_samples: int | None, timeout_s: float | None
    ) -> DeploymentResponse:
        return self._handle.sample.remote(inputs, params, adapter_name, num_samples=num_samples, timeout_s=timeout_s)

    def _stream(
        self, inputs: Any, params: Any, adapter_name: str, num_samples: int | None, timeout_s: float | None
    ) -> DeploymentResponseGenerator:
        return self._handle.options(stream=True).sample_iter.remote(
            inputs, params, adapter_name, num_samples=num_samples, timeout_s=timeout_s
        )

    def _translated(self, error: BaseException) -> BaseException:
        """Our own error out of what Ray wrapped it in."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, TwinkleServeError):
                return cause
            return EngineError(f"a bug in the router of {self._name!r}: {type(cause).__name__}: {cause}")
        if isinstance(error, (RayError, RayServeException, TimeoutError)):
            return EngineError(
                f"the router of {self._name!r} did not answer: {type(error).__name__}: {error}. It is restarted by "
                "itself; send the call again."
            )
        return error


def _patience_s(timeout_s: float | None) -> float | None:
    """How long a caller waits for the router; None where it names no deadline, or none that the router accepts."""
    return timeout_s + GRACE_S if isinstance(timeout_s, (int, float)) and timeout_s > 0 else None


def _cancel(call: DeploymentResponse | DeploymentResponseGenerator) -> None:
    """Cancels a call, if it is not over; one that failed on its way raises what failed it, which the caller has."""
    with contextlib.suppress(Exception):
        call.cancel()


class _ProgressBar:
    """Prompts done of all, on the terminal, or nothing."""

    def __init__(self, total: int, *, show: bool) -> None:
        self._total = total
        self._bar: Any = None
        if show:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("prompts"), TimeElapsedColumn()
            )

    def __enter__(self) -> _ProgressBar:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        return self

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
