"""Sends the calls of this process to a router, many in a message, and receives their answers, over one connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorDiedError

from twinkle_serve import tasks
from twinkle_serve.channel import Channel, connect
from twinkle_serve.data_format.call_messages import (
    PLAIN,
    Answer,
    AnswerItem,
    CallKind,
    CallMessage,
    CallRequest,
    ControlCall,
    SentCall,
)
from twinkle_serve.data_format.inputs import PackedInputs
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.sample_updates import WaitingUpdates
from twinkle_serve.errors import RequestError, ServiceError
from twinkle_serve.tasks import BackgroundTasks

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

SESSION_S = 2.0
"""How long a session takes new calls: the next one is with whichever router Serve has by then."""


FEW_CALLS = 4
GATHER_S = 0.004
"""With more than FEW_CALLS calls under way, a call waits so long for others to share its message."""


MAX_MOVES = 3
"""A call that so many sessions have ended without is not simply sent in the next: it may be what ends them."""

END_S = 5.0
"""When the stream or the connection of a session has ended, the other must end within this time."""


class SessionLostError(Exception):
    """A session ended in the middle of a call, or has no connection."""


class RunningCall:
    """A call that was sent."""

    def __init__(self, kind: CallKind, request: CallRequest, on_sent: Callable[[], None]) -> None:
        self.kind, self.request, self.on_sent = kind, request, on_sent
        self.session: _Session | None = None
        self.by_handle: asyncio.Task[None] | None = None
        """Carries the call if no session does."""
        self.number = 0
        self.begun = False
        """Whether any item has arrived."""
        self.moves = 0
        """How often it was sent in a session that ended without it."""
        self._answers: deque[Answer | WaitingUpdates | BaseException] = deque()
        """Updates that follow each other are joined."""
        self._arrived = asyncio.Event()
        """Set while there are answers."""
        self._over = False

    def put(self, answer: Answer | BaseException) -> None:
        """Hands over an item, or the error by which the session ended."""
        self.begun = True
        self._arrived.set()
        if not isinstance(answer, Answer) or not isinstance(answer.item, list):
            self._answers.append(answer)
            return
        latest = self._answers[-1] if self._answers else None
        if not isinstance(latest, WaitingUpdates):
            latest = WaitingUpdates()
            self._answers.append(latest)
        for update in answer.item:
            latest.add(update)

    async def next(self) -> AnswerItem | None:
        """Returns the next item; None when the call is over. Raises its error, or that by which the session ended."""
        if self._over:
            return None
        await self._arrived.wait()
        answer = self._answers.popleft()
        if not self._answers:
            self._arrived.clear()
        if isinstance(answer, WaitingUpdates):
            return answer.take()
        if isinstance(answer, BaseException):
            raise answer
        if answer.error is not None:
            raise answer.error
        self._over = answer.last
        return answer.item

    def __await__(self) -> Generator[Any, None, Any]:
        """Waits for the only item."""
        return self.next().__await__()

    def abandon(self) -> None:
        """Tells the router that nobody waits for it any more. Ignored if it is over."""
        if self.session is not None:
            self.session.abandon(self)
        if self.by_handle is not None:
            self.by_handle.cancel()


class _Session:
    """One connection to a router."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.opened_at = self._loop.time()
        self.channel: Channel[CallMessage, list[Answer]] = Channel(self._take, self._end)
        self.connected = False
        self.calls: dict[int, RunningCall] = {}
        """Calls that are not over, by number."""
        self._next_call = 0
        self._outgoing: list[RunningCall] = []
        self._abandoned: list[int] = []
        self._flush_due = False
        self.ended = self._last = False
        self.over = False
        """Whether the router has ended it."""

    @property
    def age_s(self) -> float:
        return self._loop.time() - self.opened_at

    def add(self, call: RunningCall) -> None:
        """Sends a call with the next message, in the next turn of the event loop."""
        assert not self.ended
        call.session, call.number = self, self._next_call
        self._next_call += 1
        self.calls[call.number] = call
        self._outgoing.append(call)
        self.flush_soon()

    def abandon(self, call: RunningCall) -> None:
        if self.calls.pop(call.number, None) is None:
            return
        if call in self._outgoing:
            self._outgoing.remove(call)
        else:
            self._abandoned.append(call.number)
            self.flush_soon()

    def close(self) -> None:
        """Takes no further calls; the router ends the session when those that run are over."""
        self._last = True
        self.flush_soon()

    def flush_soon(self) -> None:
        if self._flush_due:
            return
        self._flush_due = True
        if len(self.calls) > FEW_CALLS:
            self._loop.call_later(GATHER_S, self._flush)
        else:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if not self.connected or self.ended or not (self._outgoing or self._abandoned or self._last):
            return
        calls, self._outgoing = self._outgoing, []
        abandoned, self._abandoned = self._abandoned, []
        try:
            self._post(calls, abandoned)
        except Exception:  # one of the calls cannot be pickled: it fails alone
            self._post([], abandoned)
            for call in calls:
                try:
                    self._post([call])
                except Exception as error:
                    del self.calls[call.number]
                    call.put(RequestError(f"the call cannot be sent: {type(error).__name__}: {error}. {PLAIN}"))

    def _post(self, calls: Sequence[RunningCall], abandoned: Sequence[int] = ()) -> None:
        sent = [SentCall.pack(call.number, call.kind, call.request) for call in calls]
        self.channel.send(CallMessage(sent, abandoned, self._last))
        for call in calls:
            call.on_sent()

    def _end(self) -> None:
        """Takes no more calls: nothing that is sent arrives."""
        self.ended = True

    def _take(self, answers: list[Answer]) -> None:
        """Hands answers to their calls. Without any, the router has ended the session."""
        if not answers:
            self.over = self.ended = True
            self.channel.close()
        for answer in answers:
            call = self.calls.pop(answer.call, None) if answer.last else self.calls.get(answer.call)
            if call is not None:
                call.put(answer)


class RouterConnection:
    """The calls of this process to one application.

    Guarantees:
        Calls that are made in one turn of the event loop share a message, and their answers do as they come.
        A call that a session has ended without is sent in the next one.
        A call in whose middle the router ends gets Ray's error, or SessionLostError.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        """
        Args:
            handle: of the application's ingress.
        """
        self._handle, self._streams = handle, handle.options(stream=True)
        self._current: _Session | None = None
        self._next: _Session | None = None
        """Opened to take the place of the current one."""
        self._tasks = BackgroundTasks()

    def control(self, method: str, *arguments: object) -> RunningCall:
        """Sends a call of one of CONTROLS; await it for its answer. On the event loop of the connection."""
        call = RunningCall("control", ControlCall(method, arguments), lambda: None)
        self._session().add(call)
        return call

    def start(self, kind: CallKind, request: SampleRequest, on_sent: Callable[[], None]) -> RunningCall:
        """Sends a call. On the event loop of the connection.

        Args:
            on_sent: called when it is on its way: a call by handle after that comes after it.
        """
        call = RunningCall(kind, request, on_sent)
        if isinstance(request.inputs, PackedInputs):
            self._session().add(call)
        else:
            call.by_handle = self._tasks.spawn(self._call_by_handle(call))
        return call

    async def _call_by_handle(self, call: RunningCall) -> None:
        """Carries a call whose inputs hold references: Ray counts those that it carries itself."""
        response: Any = None
        try:
            handle = self._handle if call.kind == "run" else self._streams
            response = getattr(handle, call.kind).remote(call.request)
            call.on_sent()
            if call.kind == "run":
                call.put(Answer(0, await response))
            else:
                async for item in response:
                    call.put(Answer(0, item))
            call.put(Answer(0, last=True))
        except BaseException as error:
            if response is not None:
                with contextlib.suppress(Exception):
                    response.cancel()
            if tasks.is_cancelled():
                raise
            call.put(error)

    def _session(self) -> _Session:
        """Returns the session that takes new calls, which has not ended."""
        current, following = self._current, self._next
        if following is not None and following.ended:  # it was idle for too long, or could not be opened
            following = None
            if current is not None:
                current.opened_at = asyncio.get_running_loop().time()
        if current is None or current.ended:
            current, following = following or self._opened(), None
        elif following is None:
            if current.age_s > SESSION_S and current.connected:
                following = self._opened()
        elif following.connected:
            current.close()
            current, following = following, None
        self._current, self._next = current, following
        return current

    def _opened(self) -> _Session:
        session = _Session()
        self._tasks.spawn(self._keep(session))
        return session

    async def _keep(self, session: _Session) -> None:
        """Connects a session, and moves or ends its calls when it has ended."""
        error: BaseException | None = None
        stream: Any = None
        try:
            stream = self._streams.answers.remote()
            address = await anext(stream)
            try:
                await connect(address, session.channel)
            except OSError as refused:
                at = f"{address.host}:{address.port}"
                raise SessionLostError(f"no connection to the router at {at}: {refused or 'no answer'}") from refused
            session.connected = True
            session.flush_soon()
            await _both_end(stream, session.channel)
            if (unread := session.channel.error) is not None:
                raise ServiceError(
                    f"an answer of the router cannot be read here: {type(unread).__name__}: {unread}. Install the "
                    "packages of the service's environment, in their versions."
                )
            if not session.over:
                raise SessionLostError("the connection to the router was lost")
        except Exception as raised:
            error = raised
        except asyncio.CancelledError:
            if tasks.is_cancelled():
                raise
            error = ActorDiedError()  # Serve reports a router's death so too
        finally:
            session.ended = True
            session.channel.close()
            if stream is not None:
                with contextlib.suppress(Exception):
                    stream.cancel()
        calls, session.calls = session.calls, {}
        for call in calls.values():
            if error is None and not call.begun and call.moves < MAX_MOVES:
                call.moves += 1  # its message came after the end of an idle session
                self._session().add(call)
            else:
                call.put(error or SessionLostError("the session ended"))


async def _both_end(stream: Any, channel: Channel[Any, Any]) -> None:
    """Waits until a session has ended. Raises the error of its stream, which is that of the router's process, or
    SessionLostError where the connection alone has ended."""
    stream_end = asyncio.ensure_future(anext(stream, None))
    channel_end = asyncio.ensure_future(channel.ended.wait())
    try:
        await asyncio.wait({stream_end, channel_end}, return_when=asyncio.FIRST_COMPLETED)
        if not (await asyncio.wait({stream_end}, timeout=END_S))[0]:
            raise SessionLostError("the connection to the router was lost")
        stream_end.result()
    finally:
        channel_end.cancel()
        stream_end.cancel()
        stream_end.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else asks
