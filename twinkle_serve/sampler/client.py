"""Calls the router of a running service through its Serve handle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import ray
from ray import serve
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    TaskCancelledError,
)
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, RequestCancelledError

from twinkle_serve import tasks, timing
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.data_format.call_messages import CONTROLS, AnswerItem, CallKind
from twinkle_serve.data_format.inputs import PackedInputs
from twinkle_serve.data_format.sample_request import Inputs, SampleRequest
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.errors import DeadlineError, QueueFullError, ServiceError, TwinkleServeError
from twinkle_serve.remote.applications import require_own
from twinkle_serve.remote.clusters import serve_command
from twinkle_serve.remote.errors import raised_error
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.bucket_sending import sending
from twinkle_serve.sampler.connection import RouterConnection, RunningCall, SessionLostError
from twinkle_serve.sampler.lease_keeper import keep_renewed
from twinkle_serve.sampler.loop_thread import service_loop
from twinkle_serve.sampler.received_updates import ReceivedUpdates
from twinkle_serve.sampler.retry import RETRY_PAUSES_S, Attempts, pack_inputs
from twinkle_serve.sampler.router_client import BucketSender, RouterClient
from twinkle_serve.tasks import BackgroundTasks

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

REPEATED = frozenset(
    {
        RouterAPI.cancel,
        RouterAPI.status,
        RouterAPI.telemetry,
        RouterAPI.calls,
        RouterAPI.state_keys,
        RouterAPI.check_template,
        RouterAPI.encode,
        RouterAPI.count_tokens,
        RouterAPI.decode,
        RouterAPI.read_sessions,
        RouterAPI.list_sessions,
        RouterAPI.submit,
        RouterAPI.incarnation,
        RouterAPI.collect,
        RouterAPI.completions,
        RouterAPI.report_lost,
        RouterAPI.forget,
        RouterAPI.renew_futures,
        RouterAPI.end_futures,
        RouterAPI.end_sessions,
    }
)
"""Control calls that are sent again when the router dies: they are idempotent. Calls that sample are, too."""

ROUTER_DEATHS = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,
    DeploymentUnavailableError,
    RequestCancelledError,
    SessionLostError,
    TaskCancelledError,
)


class ServiceClient(RouterClient):
    """A router behind a Serve handle.

    Guarantees:
        A call that samples outlives the router: it is sent again, under the same id, within its remaining time, and
            without the prompts whose responses have arrived.
        So does a call with updates, while the unfinished samples whose updates have arrived are seeded or greedy;
            these updates are not yielded again. Any other one raises the error of a lost router.
        A caller that stops waiting cancels its call in the service.
    Does not guarantee:
        That a text stream outlives the router once it has begun.
    """

    def __init__(self, handle: DeploymentHandle, name: str) -> None:
        """
        Args:
            handle: of the application's ingress.
            name: of the application.
        """
        self.loop = service_loop()
        self._handle = handle
        self._connection = RouterConnection(handle)
        self._name = name
        self._caller = uuid.uuid4().hex
        self._running: dict[str, Attempts] = {}
        """Calls that sample, by request id."""
        self._tasks = BackgroundTasks()
        self._keeper: asyncio.Task[None] | None = None
        """Renews the leases of running calls."""
        self._request_timeout_s: float | None = None
        """The service's default deadline, once it is known."""

    # -- sampling --------------------------------------------------------------------------------

    def snapshot(self, inputs: Inputs) -> Inputs:
        return pack_inputs(inputs)

    def prepare(self, request: SampleRequest) -> SampleRequest:
        inputs = self.snapshot(request.inputs)
        return replace(
            request,
            inputs=inputs,
            request_id=request.request_id or uuid.uuid4().hex,
            caller=self._caller,
            lease_s=timing.CALL_LEASE_S,
            return_inputs=not isinstance(inputs, PackedInputs),
        )

    async def run(self, request: SampleRequest) -> SampleResponse:
        async with self._attempts(request) as attempts:
            while True:
                call = self._connection.start("run", attempts.next_request(), attempts.begun.set)
                try:
                    async with asyncio.timeout(attempts.patience_s):
                        return attempts.received(cast(SampleResponse, await call.next()))
                except BaseException as error:
                    call.abandon()
                    await self._wait_to_repeat(attempts, error)

    async def run_iter(self, request: SampleRequest) -> AsyncGenerator[SampleResponse, None]:
        async with (
            self._attempts(request) as attempts,
            contextlib.aclosing(self._items(attempts, "run_iter")) as responses,
        ):
            async for response in responses:
                yield attempts.received(cast(SampleResponse, response))

    async def run_updates(self, request: SampleRequest) -> AsyncGenerator[UpdatesItem, None]:
        received = ReceivedUpdates()
        async with (
            self._attempts(request) as attempts,
            contextlib.aclosing(self._items(attempts, "run_updates")) as items,
        ):
            async for item in items:
                new = received.new(cast(UpdatesItem, item))
                attempts.may_repeat = received.may_repeat
                if isinstance(new, SampleResponse):
                    yield attempts.received(new)
                elif new is not None:
                    yield new

    async def run_stream(self, request: SampleRequest) -> AsyncGenerator[tuple[str, StopReason | None], None]:
        async with (
            self._attempts(request) as attempts,
            contextlib.aclosing(self._items(attempts, "run_stream")) as deltas,
        ):
            async for delta in deltas:
                attempts.may_repeat = False
                yield cast(tuple[str, StopReason | None], delta)

    async def _items(self, attempts: Attempts, kind: CallKind) -> AsyncGenerator[AnswerItem, None]:
        """Yields items of a call, over all its attempts."""
        while True:
            call = self._connection.start(kind, attempts.next_request(), attempts.begun.set)
            try:
                while True:
                    try:
                        # A slow reader may ask long after the deadline for items that have arrived: each wait has a
                        # grace.
                        async with asyncio.timeout(max(timing.ROUTER_GRACE_S, attempts.patience_s)):
                            item = await call.next()
                    except Exception as error:
                        await self._wait_to_repeat(attempts, error)
                        break
                    if item is None:
                        return
                    yield item
            finally:
                call.abandon()

    @contextlib.asynccontextmanager
    async def _attempts(self, request: SampleRequest) -> AsyncGenerator[Attempts, None]:
        """Registers a call that samples, and keeps its lease, while it runs."""
        attempts = Attempts(request)
        self._running[request.request_id] = attempts
        if self._keeper is None:
            self._keeper = self._tasks.spawn(keep_renewed(self._renew_leases, timing.CALL_LEASE_S / 4))
        try:
            attempts.begin(await self._limit_s(request.timeout_s))
            yield attempts
        finally:
            attempts.begun.set()
            del self._running[request.request_id]
            if not self._running and self._keeper is not None:
                self._keeper.cancel()
                self._keeper = None

    async def _renew_leases(self) -> None:
        async with asyncio.timeout(timing.CALL_LEASE_S / 4):
            await self._send(self._handle, RouterAPI.renew, list(self._running), timing.CALL_LEASE_S)

    async def _limit_s(self, timeout_s: float | None) -> float:
        """Returns the deadline of a call in seconds. The router enforces it, or refuses an invalid one."""
        if timeout_s is None:
            if self._request_timeout_s is None:
                status = await self.call(timing.CONTROL_TIMEOUT_S, RouterAPI.status)
                self._request_timeout_s = status["request_timeout_s"]
            return self._request_timeout_s
        valid = isinstance(timeout_s, (int, float)) and 0 < timeout_s < float("inf")
        return timeout_s if valid else timing.CONTROL_TIMEOUT_S

    # -- control calls ---------------------------------------------------------------------------

    async def call(
        self,
        timeout_s: float,
        method: Callable[Concatenate[RouterAPI, P], Awaitable[T]],
        *args: P.args,
        **options: P.kwargs,
    ) -> T:
        deadline = asyncio.get_running_loop().time() + timeout_s + timing.ROUTER_GRACE_S
        count = 0
        while True:
            response = self._send(self._handle, method, *args, **options)
            try:
                async with asyncio.timeout_at(deadline):
                    answer: T = await response
                    return answer
            except BaseException as error:
                _cancel(response)
                error = _own_cancellation(error)
                if isinstance(error, TimeoutError) and raised_error(error) is None:
                    raise DeadlineError(
                        f"{method.__name__} did not end within {timeout_s:g} s, and the router of {self._name!r} did "
                        f"not say so within {timing.ROUTER_GRACE_S:g} s. See `serve status`; allow more time, or send "
                        "it again."
                    ) from None
                left_s = deadline - asyncio.get_running_loop().time()
                repeat = method in REPEATED and _is_death(error) and left_s > 0 and count < len(RETRY_PAUSES_S)
                if not (repeat and await self._is_deployed(left_s)):
                    raise self._translated(error) from None
            logger.warning(f"the router of {self._name!r} died; {method.__name__} is sent again")
            await asyncio.sleep(RETRY_PAUSES_S[count])
            count += 1

    async def cancel(self, request_id: str, inputs: list[int] | None) -> int:
        if (attempts := self._running.get(request_id)) is not None:
            await attempts.begun.wait()  # the router does not know the call before
            attempts.cancel(inputs)  # later attempts leave them out
        return await self.call(timing.ANSWER_TIMEOUT_S, RouterAPI.cancel, request_id, inputs)

    def sending(self) -> contextlib.AbstractContextManager[BucketSender]:
        return sending()

    def shutdown(self, *, force: bool = False) -> None:
        if ray.is_initialized() and self._name in serve.status().applications:
            if not force:
                require_own(self._name, "deleted", "Leave it to its owner, or call shutdown(force=True).")
            with contextlib.suppress(TwinkleServeError):  # an unreachable service is deleted all the same
                self.loop.call(self.call(timing.ROUTER_GRACE_S, RouterAPI.purge))
            serve.delete(self._name)

    # -- failures --------------------------------------------------------------------------------

    def _send(self, handle: DeploymentHandle, method: Callable[..., object], *args: object, **options: object) -> Any:
        """Calls a method of the router, named by a method of `RouterAPI`. Returns Serve's response or its stream."""
        try:
            if method.__name__ in CONTROLS and not any(
                isinstance(each, AdapterFiles) and not each.is_small() for each in args
            ):
                return self._connection.control(method.__name__, *args)
            return getattr(handle, method.__name__).remote(*args, **options)
        except Exception as error:
            raise self._translated(error) from error

    async def _wait_to_repeat(self, attempts: Attempts, error: BaseException) -> None:
        """Waits until a call may be sent again. Raises its error where a repetition does not help."""
        error = _own_cancellation(error)
        translated = self._translated(error)
        if isinstance(error, TimeoutError) and raised_error(error) is None:
            # The router counts from the arrival of the call, which waits for it while it is being replaced.
            translated = DeadlineError(
                f"timeout_s={attempts.limit_s:g} passed, and the router of {self._name!r} did not say so within "
                f"{timing.ROUTER_GRACE_S:g} s: it is busy, or was replaced meanwhile (the call was sent "
                f"{attempts.count + 1} times). Raise timeout_s, or ask for less."
            )
        if attempts.count and attempts.left_s > 0 and isinstance(translated, QueueFullError):
            await asyncio.sleep(translated.retry_after_s)  # the previous router had accepted it
            return
        repeat = attempts.may_repeat and _is_death(error) and attempts.left_s > 0
        if not (repeat and attempts.count < len(RETRY_PAUSES_S) and await self._is_deployed(attempts.patience_s)):
            raise attempts.failed(translated) from None
        attempts.count += 1
        what = "the connection to" if isinstance(error, SessionLostError) else "the process of"
        logger.warning(f"{what} the router of {self._name!r} has ended; a call is sent again ({attempts.count})")
        await asyncio.sleep(RETRY_PAUSES_S[attempts.count - 1])

    async def _is_deployed(self, patience_s: float) -> bool:
        """Whether the application has not been deleted, as far as is known; False if nothing answers in time."""
        answer: Future[bool] = Future()

        answer.set_running_or_notify_cancel()  # a caller that stops waiting does not cancel it

        def ask() -> None:
            try:
                answer.set_result(self._name in serve.status().applications)
            except Exception:  # the controller is being replaced
                answer.set_result(True)

        # serve.status has no timeout; a daemon thread lets the process end without its answer.
        threading.Thread(target=ask, name="status", daemon=True).start()
        try:
            async with asyncio.timeout(min(timing.CONTROLLER_TIMEOUT_S, patience_s)):
                return await asyncio.wrap_future(answer)
        except TimeoutError:
            return False

    def _translated(self, error: BaseException) -> BaseException:
        """Returns our own error for one that Ray or Serve raised."""
        if (raised := raised_error(error)) is not None:
            if isinstance(raised, TwinkleServeError):
                return raised
            cause: object = getattr(raised, "cause", raised)
            return ServiceError(f"a bug in the router of {self._name!r}: {type(cause).__name__}: {cause}")
        if isinstance(error, TimeoutError):
            return ServiceError(
                f"the router of {self._name!r} did not answer in time. See {serve_command('status')}; send it again."
            )
        if isinstance(error, (RayError, RayServeException, SessionLostError)):
            return ServiceError(
                f"the router of {self._name!r} did not answer: {type(error).__name__}: {error}. It is restarted by "
                f"itself where its service still runs, as {serve_command('status')} tells; then send the call again."
            )
        return error


def _own_cancellation(error: BaseException) -> BaseException:
    """Returns the error of a call; re-raises the cancellation of the caller."""
    if isinstance(error, asyncio.CancelledError):
        if tasks.is_cancelled():
            raise error
        died: BaseException = ActorDiedError()
        return died
    if not isinstance(error, Exception):
        raise error
    return error


def _is_death(error: BaseException) -> bool:
    """Whether a call failed because its router is gone."""
    return raised_error(error) is None and isinstance(error, ROUTER_DEATHS)


def _cancel(call: DeploymentResponse | DeploymentResponseGenerator | RunningCall) -> None:
    """Cancels a call. Ignored if it is over; its caller has the error of a call that failed to be sent."""
    with contextlib.suppress(Exception):
        call.abandon() if isinstance(call, RunningCall) else call.cancel()
