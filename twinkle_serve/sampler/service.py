"""Calls a running service from any process of its Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import EngineError, ServiceNotReadyError, TwinkleServeError, unknown_name
from twinkle_serve.remote.reservation import join_or_start
from twinkle_serve.sampler.base import CONTROL_TIMEOUT_S, RunningSampler

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
    from ray.serve.schema import ApplicationStatusOverview

logger = logging.getLogger("ray.serve")

GRACE_S = 10.0
"""The router keeps deadlines; a caller waits this much longer before it takes the router for gone. A router that dies
ends every call; one that cannot be replaced is seen only by this."""


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
    if (state := _state_when_running(name, timeout_s)) != "RUNNING":
        raise ServiceNotReadyError(
            f"application {name!r} is still {state} after timeout_s={timeout_s:g}. Raise timeout_s, or see its "
            "deployments with `serve status`."
        )
    return ServiceSampler(serve.get_app_handle(name), name)


def deploy(name: str, args: ServiceArgs, build: Callable[[ServiceArgs], Application]) -> ServiceBackend:
    """Serves an application under a name, next to others; one of that name is replaced. Returns when all its engines
    can be sampled from.

    Joins the Ray cluster as `connect` does, or starts one on this machine.

    Raises:
        ConfigError: the arguments cannot be; as `build`.
        ServiceNotReadyError: it did not start; the message has the reason.
    """
    join_or_start(log_to_driver=False)
    if name in serve.status().applications:
        logger.warning(f"application {name!r} is there already: it is replaced; engines go on where nothing changed")
    target = serve.RunTarget(build(args), name=name, route_prefix=None)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    try:
        if _state_when_running(name, args.startup_timeout_s + GRACE_S) != "RUNNING":
            raise ServiceNotReadyError(
                f"application {name!r} was not up within startup_timeout_s={args.startup_timeout_s:g}, and is deleted. "
                "Either its model takes longer, or Ray has no room for its engines: see `ray status`."
            )
        backend = ServiceBackend(handle, name)
        wait_for_engines(backend, args.startup_timeout_s)
    except BaseException:  # nobody has an object to shut it down with, and some of its engines may be up
        serve.delete(name, _blocking=False)
        raise
    return backend


def wait_for_engines(backend: ServiceBackend, timeout_s: float) -> None:
    """Waits until the router of a running application uses all its engines; it finds them one by one.

    Raises:
        ServiceNotReadyError: it did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        engines = backend.call("status", timeout_s=CONTROL_TIMEOUT_S)["engines"]
        if not (missing := [name for name, engine in engines.items() if engine["state"] != "ready"]):
            return
        if time.monotonic() > deadline:
            names = ", ".join(missing)
            raise ServiceNotReadyError(f"{names} did not answer within {timeout_s:g} s. See `serve status`.")
        time.sleep(0.05)


def _state_when_running(name: str, timeout_s: float) -> str:
    """RUNNING as soon as it can be called, or the state that it has been in for too long.

    A handle to an application that failed would wait for ever, so its state is asked first.

    Raises:
        ServiceNotReadyError: no such application, or one that failed.
    """
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
            return "RUNNING"
        if state in ("DEPLOY_FAILED", "DELETING"):
            raise ServiceNotReadyError(f"application {name!r} is {state}: {failure_reason(application)}")
        if time.monotonic() > deadline:
            return state
        time.sleep(0.2)


def failure_reason(application: ApplicationStatusOverview) -> str:
    """The error of ours that an application's status quotes in a traceback, or all that it says."""
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    for message in messages:
        if found := re.findall(r"^(?:\w+\.)*(\w+Error: .+)$", message, re.MULTILINE):
            return str(found[-1])
    return "\n".join(filter(None, messages))


class ServiceSampler(RunningSampler):
    """A running service, called by handle.

    Guarantees: an abandoned iterator or a cancelled coroutine is cancelled in the service.
    """

    def __init__(self, handle: DeploymentHandle, name: str) -> None:
        """
        Args:
            handle: of the application's ingress.
            name: of the application.
        """
        super().__init__(ServiceBackend(handle, name))


SAMPLING = ("sample", "sample_iter", "sample_stream")


class ServiceBackend:
    """A router behind a Serve handle."""

    def __init__(self, handle: DeploymentHandle, name: str) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)
        self._name = name
        self._request_timeout_s: float | None = None
        """The config's, once the router was asked."""

    def call(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        self._learn_limit(timeout_s)
        response = self._send(self._handle, method, args, timeout_s, options)
        try:
            return response.result(timeout_s=self._patience_s(timeout_s))
        except BaseException as error:
            _cancel(response)
            raise self._translated(error) from None

    async def call_async(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        await self._learn_limit_async(timeout_s)
        response = self._send(self._handle, method, args, timeout_s, options)
        try:
            async with asyncio.timeout(self._patience_s(timeout_s)):
                return await response
        except BaseException as error:
            _cancel(response)
            raise self._translated(error) from None

    def iterate(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Iterator[Any]:
        stream = self._send(self._streams, method, args, timeout_s, options)
        items = self._each(stream, timeout_s)
        weakref.finalize(items, _cancel, stream)  # a generator that was never started runs no `finally`
        return items

    def _each(self, stream: DeploymentResponseGenerator, timeout_s: float | None) -> Iterator[Any]:
        late = threading.Event()

        def give_up() -> None:
            late.set()
            _cancel(stream)

        try:
            self._learn_limit(timeout_s)
            deadline = time.monotonic() + self._patience_s(timeout_s)
            while True:
                # A slow reader may come late for what has arrived long since: only the wait for the router is bounded.
                watch = threading.Timer(max(GRACE_S, deadline - time.monotonic()), give_up)
                watch.daemon = True
                watch.start()
                try:
                    item = next(stream)
                except StopIteration:
                    return
                finally:
                    watch.cancel()
                yield item
        except Exception as error:
            raise self._translated(TimeoutError() if late.is_set() else error) from None
        finally:
            _cancel(stream)

    async def iterate_async(
        self, method: str, *args: Any, timeout_s: float | None = None, **options: Any
    ) -> AsyncIterator[Any]:
        stream = self._send(self._streams, method, args, timeout_s, options)
        try:
            await self._learn_limit_async(timeout_s)
            deadline = time.monotonic() + self._patience_s(timeout_s)
            while True:
                async with asyncio.timeout(max(GRACE_S, deadline - time.monotonic())):
                    try:
                        item = await anext(stream)
                    except StopAsyncIteration:
                        return
                yield item
        except Exception as error:
            raise self._translated(error) from None
        finally:
            _cancel(stream)

    def parcel(self, data: Any) -> Any:
        return [ray.put(data)]  # in a list: Ray does not fetch it for the router's process

    def shutdown(self) -> None:
        if ray.is_initialized() and self._name in serve.status().applications:
            with contextlib.suppress(TwinkleServeError):  # one that cannot be reached is deleted all the same
                self.call("forget", timeout_s=GRACE_S)
            serve.delete(self._name)

    def _send(
        self, handle: DeploymentHandle, method: str, args: Any, timeout_s: float | None, options: dict[str, Any]
    ) -> Any:
        """Calls a method; those that sample keep the deadline themselves."""
        if method in SAMPLING:
            options = {**options, "timeout_s": timeout_s}
        try:
            return getattr(handle, method).remote(*args, **options)
        except Exception as error:
            raise self._translated(error) from error

    def _learn_limit(self, timeout_s: float | None) -> None:
        """Asks the router, once, for the deadline of calls that name none."""
        if timeout_s is None and self._request_timeout_s is None:
            self._request_timeout_s = self.call("status", timeout_s=CONTROL_TIMEOUT_S)["request_timeout_s"]

    async def _learn_limit_async(self, timeout_s: float | None) -> None:
        if timeout_s is None and self._request_timeout_s is None:
            status = await self.call_async("status", timeout_s=CONTROL_TIMEOUT_S)
            self._request_timeout_s = status["request_timeout_s"]

    def _patience_s(self, timeout_s: float | None) -> float:
        """How long a caller waits for the router, which ends a call at its deadline or refuses one that is none."""
        limit_s = self._request_timeout_s if timeout_s is None else timeout_s
        known = isinstance(limit_s, (int, float)) and 0 < limit_s < float("inf")
        return (limit_s if known else CONTROL_TIMEOUT_S) + GRACE_S  # type: ignore[operator]

    def _translated(self, error: BaseException) -> BaseException:
        """Our own error out of what Ray wrapped it in."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, TwinkleServeError):
                return cause
            return EngineError(f"a bug in the router of {self._name!r}: {type(cause).__name__}: {cause}")
        if isinstance(error, TimeoutError):
            return EngineError(
                f"the router of {self._name!r} did not answer in time. See `serve status`; send it again."
            )
        if isinstance(error, (RayError, RayServeException)):
            return EngineError(
                f"the router of {self._name!r} did not answer: {type(error).__name__}: {error}. It is restarted by "
                "itself; send the call again."
            )
        return error


def _cancel(call: DeploymentResponse | DeploymentResponseGenerator) -> None:
    """Cancels a call, if it is not over; one that failed on its way raises what failed it, which the caller has."""
    with contextlib.suppress(Exception):
        call.cancel()
