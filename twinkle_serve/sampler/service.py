"""Calls a running service from any process of its Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray import cloudpickle, serve
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
)
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, RequestCancelledError

from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.inputs import PackedInputs, as_list
from twinkle_serve.errors import (
    DeadlineError,
    EngineError,
    PromptError,
    QueueFullError,
    ServiceNotReadyError,
    TwinkleServeError,
    unknown_name,
)
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

CONTROLLER_S = 30.0
"""A controller of Serve that is silent for longer is not being replaced, its cluster is gone: on two busy cores a
process of Serve is back after 10 to 17 s. Ray ends a process whose cluster has been gone for 60 s."""


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
        if not (missing := [name for name, engine in engines.items() if engine["state"] not in ("ready", "drained")]):
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


REPEATED = frozenset({*SAMPLING, "cancel", "status", "state_keys", "check_template"})
"""Calls that are sent again when the router dies: nothing comes of doing them twice."""

LEASE_S = 60.0
"""A call is given up when this process has not said for so long that it is there."""

PAUSES_S = (0.1, 0.3, 1.0, 1.0, 2.0, 2.0, 5.0, 5.0)
"""Before a call is sent again, so many times: it may be what kills its routers."""


class _Leases:
    """Says to the router, for as long as calls of this process run, that it is there."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._ids: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._changed = threading.Event()

    @contextlib.contextmanager
    def holding(self, request_id: str) -> Iterator[None]:
        with self._lock:
            self._ids.add(request_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._ids.discard(request_id)

    def _renew(self) -> None:
        while True:
            time.sleep(LEASE_S / 4)
            with self._lock:
                if not (ids := list(self._ids)):
                    self._thread = None
                    return
            with contextlib.suppress(Exception):  # of a router that is being replaced
                self._handle.renew.remote(ids, LEASE_S).result(timeout_s=LEASE_S / 4)


class ServiceBackend:
    """A router behind a Serve handle.

    Guarantees: a call that samples outlives the router: it is sent again, under the same id and with what is left of
        its time, and asks for nothing that it has already. A stream whose text has begun does not.
    """

    def __init__(self, handle: DeploymentHandle, name: str) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)
        self._name = name
        self._caller = uuid.uuid4().hex
        self._leases = _Leases(handle)
        self._running: dict[str, _Attempts] = {}
        """Calls that sample, by their ids."""
        self._request_timeout_s: float | None = None
        """The config's, once the router was asked."""

    def call(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        self._note_cancelled(method, args)
        self._learn_limit(timeout_s)
        with self._attempts(method, args, timeout_s, options) as attempts:
            while True:
                response = self._send(self._handle, attempts)
                try:
                    return attempts.received(response.result(timeout_s=attempts.patience_s))
                except BaseException as error:
                    self._give_up(attempts, response, error)
                    time.sleep(self._pause_s(attempts, error))

    async def call_async(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        self._note_cancelled(method, args)
        await self._learn_limit_async(timeout_s)
        with self._attempts(method, args, timeout_s, options) as attempts:
            while True:
                response = self._send(self._handle, attempts)
                try:
                    async with asyncio.timeout(attempts.patience_s):
                        return attempts.received(await response)
                except BaseException as error:
                    self._give_up(attempts, response, error)
                    await self._pause_async(attempts, error)

    def iterate(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Iterator[Any]:
        running = _Running()
        stack = contextlib.ExitStack()
        attempts = stack.enter_context(self._attempts(method, args, timeout_s, options))
        running.stream = self._send(self._streams, attempts)
        items = self._each(running, stack, attempts)
        # A generator that was never started runs no `finally`.
        weakref.finalize(items, _end, running, stack)
        return items

    def _each(self, running: _Running, stack: contextlib.ExitStack, attempts: _Attempts) -> Iterator[Any]:
        try:
            self._learn_limit(attempts.timeout_s)
            attempts.limit_s = self._limit_s(attempts.timeout_s)
            while True:
                late = threading.Event()
                try:
                    for item in self._watched(running, attempts, late):
                        yield attempts.received(item)
                    return
                except Exception as error:
                    _cancel(running.stream)
                    time.sleep(self._pause_s(attempts, TimeoutError() if late.is_set() else error))
                running.stream = self._send(self._streams, attempts)
        except GeneratorExit as closed:
            self._give_up(attempts, running.stream, closed)
        finally:
            _end(running, stack)

    def _watched(self, running: _Running, attempts: _Attempts, late: threading.Event) -> Iterator[Any]:
        """Items of a stream that is given up when the router is silent past the deadline."""

        def give_up() -> None:
            late.set()
            _cancel(running.stream)

        while True:
            # A slow reader may come late for what has arrived long since: only the wait for the router is bounded.
            watch = threading.Timer(max(GRACE_S, attempts.patience_s), give_up)
            watch.daemon = True
            watch.start()
            try:
                item = next(running.stream)
            except StopIteration:
                return
            finally:
                watch.cancel()
            yield item

    async def iterate_async(
        self, method: str, *args: Any, timeout_s: float | None = None, **options: Any
    ) -> AsyncIterator[Any]:
        with self._attempts(method, args, timeout_s, options) as attempts:
            stream = self._send(self._streams, attempts)
            try:
                await self._learn_limit_async(timeout_s)
                attempts.limit_s = self._limit_s(timeout_s)
                while True:
                    try:
                        async with asyncio.timeout(max(GRACE_S, attempts.patience_s)):
                            try:
                                item = await anext(stream)
                            except StopAsyncIteration:
                                return
                    except Exception as error:
                        _cancel(stream)
                        await self._pause_async(attempts, error)
                        stream = self._send(self._streams, attempts)
                        continue
                    yield attempts.received(item)
            except (GeneratorExit, asyncio.CancelledError) as closed:
                self._give_up(attempts, stream, closed)
                raise
            finally:
                _cancel(stream)

    @contextlib.contextmanager
    def _attempts(
        self, method: str, args: tuple[Any, ...], timeout_s: float | None, options: dict[str, Any]
    ) -> Iterator[_Attempts]:
        """One call, however often it is sent."""
        attempts = _Attempts(method, args, timeout_s, self._limit_s(timeout_s), options)
        if method not in SAMPLING:
            yield attempts
            return
        request_id = attempts.options.setdefault("request_id", uuid.uuid4().hex)
        attempts.options |= {"caller": self._caller, "lease_s": LEASE_S}
        attempts.options |= {"return_inputs": not isinstance(attempts.args[0], PackedInputs)}
        self._running[request_id] = attempts
        try:
            with self._leases.holding(request_id):
                yield attempts
        finally:
            del self._running[request_id]

    def _give_up(self, attempts: _Attempts, call: Any, reason: BaseException) -> None:
        """Has a call end; where it is the caller that ends it, by the router itself, for Serve takes its time to."""
        _cancel(call)
        if attempts.method in SAMPLING and not isinstance(reason, Exception):
            with contextlib.suppress(Exception):
                self._handle.cancel.remote(attempts.options["request_id"])

    def _note_cancelled(self, method: str, args: Any) -> None:
        """What is cancelled is not asked for again."""
        if method == "cancel" and (attempts := self._running.get(args[0])) is not None:
            attempts.cancel(args[1])

    def _pause_s(self, attempts: _Attempts, error: BaseException) -> float:
        """How long to wait before a call is sent again; raises what it ended with where that would not do."""
        ours = self._translated(error)
        if isinstance(error, TimeoutError) and not isinstance(error, RayTaskError) and attempts.method in SAMPLING:
            # The router counts from when it gets the call, which waits for it where it is being replaced.
            ours = DeadlineError(
                f"timeout_s={attempts.limit_s:g} passed, and the router of {self._name!r} did not say so within "
                f"{GRACE_S:g} s: it is busy, or was replaced meanwhile (the call was sent {attempts.count + 1} times). "
                "Raise timeout_s, or ask for less."
            )
        if attempts.count and attempts.left_s > 0 and isinstance(ours, QueueFullError):
            return ours.retry_after_s  # the router before had taken it
        repeat = attempts.may_repeat and _is_death(error) and attempts.left_s > 0 and attempts.count < len(PAUSES_S)
        if not (repeat and self._is_there(attempts.patience_s)):
            raise ours from None
        attempts.count += 1
        logger.warning(f"the router of {self._name!r} died; {attempts.method} is sent again ({attempts.count})")
        return PAUSES_S[attempts.count - 1]

    async def _pause_async(self, attempts: _Attempts, error: BaseException) -> None:
        """Waits so long, on the caller's event loop, which asking the controller would block."""
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError):
            if task is None or task.cancelling():
                raise error
            error = ActorDiedError()  # Serve makes some errors of its own CancelledError
        elif not isinstance(error, Exception):
            raise error
        await asyncio.sleep(await asyncio.to_thread(self._pause_s, attempts, error))

    def _is_there(self, patience_s: float) -> bool:
        """Whether the application has not been deleted, as far as can be known; false if nobody answers."""
        answer: Future[bool] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._name in serve.status().applications)
            except Exception:  # the controller is being replaced
                answer.set_result(True)

        # serve.status has no deadline; a daemon, so that a process may end without its answer.
        threading.Thread(target=ask, name="status", daemon=True).start()
        try:
            return answer.result(timeout=min(CONTROLLER_S, patience_s))
        except TimeoutError:
            return False

    def put_large(self, data: Any) -> Any:
        return [ray.put(data)]  # in a list: Ray does not fetch it for the router's process

    def shutdown(self) -> None:
        if ray.is_initialized() and self._name in serve.status().applications:
            with contextlib.suppress(TwinkleServeError):  # one that cannot be reached is deleted all the same
                self.call("purge", timeout_s=GRACE_S)
            serve.delete(self._name)

    def _send(self, handle: DeploymentHandle, attempts: _Attempts) -> Any:
        """Calls a method; those that sample keep the deadline themselves."""
        try:
            return getattr(handle, attempts.method).remote(*attempts.args, **attempts.next_options())
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

    def _limit_s(self, timeout_s: float | None) -> float:
        """Deadline of a call, which the router ends then, or refuses if it is none."""
        limit_s = self._request_timeout_s if timeout_s is None else timeout_s
        known = isinstance(limit_s, (int, float)) and 0 < limit_s < float("inf")
        return limit_s if known else CONTROL_TIMEOUT_S  # type: ignore[return-value]

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
                "itself where its service still runs, as `serve status` tells; then send the call again."
            )
        return error


class _Attempts:
    """A call that may be sent more than once."""

    def __init__(
        self, method: str, args: tuple[Any, ...], timeout_s: float | None, limit_s: float, options: dict[str, Any]
    ) -> None:
        self.method, self.timeout_s, self.limit_s = method, timeout_s, limit_s
        self.args = (_packed(args[0]), *args[1:]) if method in SAMPLING else args
        self.options = dict(options)
        self.count = 0
        """Times that it was sent again."""
        self._began = time.monotonic()
        self._done: set[int] = set()
        """Indices of the inputs whose responses are there."""
        self._cancelled: set[int] | None = set()
        """Indices of the inputs that are not wanted any more; None: all."""
        self._text_began = False
        self._unread: dict[int, Any] | None = None
        """By their indices, the inputs whose responses are still to come; None before the first has."""

    def cancel(self, inputs: Iterable[int] | None) -> None:
        """Inputs are not wanted any more; None: all."""
        self._cancelled = None if inputs is None or self._cancelled is None else self._cancelled | set(inputs)

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self._began)

    @property
    def patience_s(self) -> float:
        """How long to wait for the router, which keeps the deadline by itself."""
        return max(0.0, self.left_s) + GRACE_S

    @property
    def may_repeat(self) -> bool:
        return self.method in REPEATED and not self._text_began

    def received(self, item: Any) -> Any:
        """What the router has sent, as the caller is to have it."""
        if isinstance(item, SampleResponse):
            self._done.update(item.prompt_indices)
            if isinstance(self.args[0], PackedInputs):
                if self._unread is None:
                    self._unread = dict(enumerate(self.args[0].to_list()))
                # Each comes once; a dict for each, also where the caller gave one several times.
                item = replace(item, inputs=[dict(self._unread.pop(i)) for i in item.prompt_indices])
        elif self.method == "sample_stream":
            self._text_began = True
        return item

    def next_options(self) -> dict[str, Any]:
        """Of the next attempt: what is left to do, in what time is left."""
        if self.method not in SAMPLING:
            return self.options
        timeout_s = self.timeout_s if not self.count else max(0.001, self.left_s)
        if not self.count:
            return {**self.options, "timeout_s": timeout_s}
        cancelled = None if self._cancelled is None else sorted(self._cancelled)
        return {**self.options, "timeout_s": timeout_s, "done": sorted(self._done), "cancelled": cancelled}


def _packed(inputs: Any) -> Any:
    """Inputs in the form that they are sent in: as they are now, whatever the caller does to them while the call runs.

    Those that hold references are sent as they are, in dicts of their own: Ray counts the references in arguments that
    it pickles itself. What cannot be inputs is left to the router, which says what is wrong with it.

    Raises:
        PromptError: some cannot be pickled.
    """
    if not (items := as_list(inputs)):
        return inputs
    try:
        return PackedInputs.of(items, _Pickler)
    except PromptError as error:
        if isinstance(error.__cause__, _HoldsReferenceError):
            return [dict(item) if isinstance(item, Mapping) else item for item in items]
        raise


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Ray's, but for references, which it would keep for as long as this process lives."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (ray.ObjectRef, ActorHandle)):
            raise _HoldsReferenceError
        return super().reducer_override(obj)


class _HoldsReferenceError(Exception):
    """What was to be pickled refers to an object or an actor of Ray's."""


@dataclass
class _Running:
    """The latest attempt at a stream."""

    stream: Any = None


def _end(running: _Running, stack: contextlib.ExitStack) -> None:
    """Ends a call that streams."""
    if running.stream is not None:
        _cancel(running.stream)
    stack.close()


def _is_death(error: BaseException) -> bool:
    """Whether a call failed because its router is gone, and not because of the call."""
    if isinstance(error, RayTaskError) and not isinstance(error, RayActorError):
        return False
    return isinstance(error, DEATHS)


DEATHS = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,
    DeploymentUnavailableError,
    RequestCancelledError,
    TaskCancelledError,
)


def _cancel(call: DeploymentResponse | DeploymentResponseGenerator) -> None:
    """Cancels a call, if it is not over; one that failed on its way raises what failed it, which the caller has."""
    with contextlib.suppress(Exception):
        call.cancel()
