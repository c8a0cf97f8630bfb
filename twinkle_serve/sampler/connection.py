"""Sends the calls of this process to a router, many in a message, and receives their answers on one stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorDiedError

from twinkle_serve import tasks, timing
from twinkle_serve.data_format.call_messages import PLAIN, Answer, AnswerItem, Answers, CallKind, CallMessage, SentCall
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import RequestError
from twinkle_serve.remote.inbox import Address
from twinkle_serve.tasks import BackgroundTasks

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

SESSION_S = 2.0
"""How long a session takes new calls: the next one is with whichever router Serve has by then."""


FEW_CALLS = 4
GATHER_S = 0.004
"""With more than FEW_CALLS calls under way, a call waits so long for others to share its message."""


MAX_MOVES = 3
"""A call that so many sessions have ended without is not simply sent in the next: it may be what ends them."""


class SessionLostError(Exception):
    """A session ended in the middle of a call, or its messages did not arrive."""


class RunningCall:
    """A call that was sent."""

    def __init__(self, kind: CallKind, request: SampleRequest, on_sent: Callable[[], None]) -> None:
        self.kind, self.request, self.on_sent = kind, request, on_sent
        self.session: _Session | None = None
        self.number = 0
        self.begun = False
        """Whether any item has arrived."""
        self.moves = 0
        """How often it was sent in a session that ended without it."""
        self._answers: asyncio.Queue[Answer | BaseException] = asyncio.Queue()
        self._over = False

    def put(self, answer: Answer | BaseException) -> None:
        """Hands over an item, or the error by which the session ended."""
        self.begun = True
        self._answers.put_nowait(answer)

    async def next(self) -> AnswerItem | None:
        """Returns the next item; None when the call is over. Raises its error, or that by which the session ended."""
        if self._over:
            return None
        answer = await self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        if answer.error is not None:
            raise answer.error
        self._over = answer.last
        return answer.item

    def abandon(self) -> None:
        """Tells the router that nobody waits for it any more. Ignored if it is over."""
        if self.session is not None:
            self.session.abandon(self)


class _Session:
    """One stream of answers, and the messages to the router that sends it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.opened_at = self._loop.time()
        self.address: Address[CallMessage] | None = None
        """None until the router has answered."""
        self.calls: dict[int, RunningCall] = {}
        """Calls that are not over, by number."""
        self._next_call = 0
        self._outgoing: list[RunningCall] = []
        self._abandoned: list[int] = []
        self._flush_due = False
        self._confirmed = 0
        """Number of messages that the router has taken."""
        self._unconfirmed_since: float | None = None
        self.ended = self._last = False

    @property
    def age_s(self) -> float:
        return self._loop.time() - self.opened_at

    @property
    def silent_s(self) -> float:
        """Seconds for which the router has not confirmed a message; 0 if it has confirmed all."""
        return 0.0 if self._unconfirmed_since is None else self._loop.time() - self._unconfirmed_since

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
        """Takes no further calls; the router ends the stream when those that run are over."""
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
        if self.address is None or self.ended or not (self._outgoing or self._abandoned or self._last):
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
        assert self.address is not None
        sent = [SentCall.pack(call.number, call.kind, call.request) for call in calls]
        self.address.post(CallMessage(sent, abandoned, self._last))
        if self._unconfirmed_since is None:
            self._unconfirmed_since = self._loop.time()
        for call in calls:
            call.on_sent()

    def take(self, answers: Answers) -> None:
        """Hands answers to their calls."""
        assert self.address is not None
        if answers.received == self.address.sent:
            self._unconfirmed_since = None
        elif answers.received > self._confirmed:
            self._unconfirmed_since = self._loop.time()
        self._confirmed = answers.received
        for answer in answers.unpack():
            call = self.calls.pop(answer.call, None) if answer.last else self.calls.get(answer.call)
            if call is not None:
                call.put(answer)


class RouterConnection:
    """The calls of this process to one application.

    Guarantees:
        Calls that are made in one turn of the event loop share a message, and their answers do as they come.
        A call whose message was lost is sent again, within the router's and the call's own limits.
        A call in whose middle the router ends gets Ray's error, or SessionLostError.
    """

    def __init__(self, streams: DeploymentHandle) -> None:
        """
        Args:
            streams: of the application's ingress, for methods that yield.
        """
        self._streams = streams
        self._current: _Session | None = None
        self._next: _Session | None = None
        """Opened to take the place of the current one."""
        self._tasks = BackgroundTasks()

    def start(self, kind: CallKind, request: SampleRequest, on_sent: Callable[[], None]) -> RunningCall:
        """Sends a call. On the event loop of the connection.

        Args:
            on_sent: called when it is on its way: a call by handle after that comes after it.
        """
        call = RunningCall(kind, request, on_sent)
        self._session().add(call)
        return call

    def _session(self) -> _Session:
        """Returns the session that takes new calls, which has not ended."""
        current, following = self._current, self._next
        if following is not None and following.ended:  # it was idle for too long
            following = None
        if current is None or current.ended:
            current, following = following or self._opened(), None
        elif following is None:
            if current.age_s > SESSION_S and current.address is not None:
                following = self._opened()
        elif following.address is not None:
            current.close()
            current, following = following, None
        self._current, self._next = current, following
        return current

    def _opened(self) -> _Session:
        session = _Session()
        self._check(session, self._tasks.spawn(self._receive(session)))
        return session

    async def _receive(self, session: _Session) -> None:
        """Receives the answers of a session until it ends."""
        error: BaseException | None = None
        stream: Any = None
        try:
            stream = self._streams.answers.remote()
            session.address = await anext(stream)
            session.flush_soon()
            async for answers in stream:
                session.take(answers)
        except Exception as raised:
            error = raised
        except asyncio.CancelledError:
            # Serve reports a router's death so too; or the router was silent.
            error = SessionLostError("the router was silent") if tasks.is_cancelled() else ActorDiedError()
        finally:
            session.ended = True
            if stream is not None:
                with contextlib.suppress(Exception):
                    stream.cancel()
        calls, session.calls = session.calls, {}
        for call in calls.values():
            if error is None and not call.begun and call.moves < MAX_MOVES:
                call.moves += 1  # its message came after the end of an idle session, or was lost
                self._session().add(call)
            else:
                call.put(error or SessionLostError("the session ended"))

    def _check(self, session: _Session, receiving: asyncio.Task[None]) -> None:
        """Ends a session whose messages do not arrive."""
        if session.ended:
            return
        if session.silent_s > timing.SESSION_SILENCE_S:
            logger.warning(f"the router has taken no message for {session.silent_s:.0f} s; calls are sent again")
            receiving.cancel()
            return
        asyncio.get_running_loop().call_later(timing.SESSION_SILENCE_S / 4, self._check, session, receiving)
