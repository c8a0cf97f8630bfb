"""Runs the calls of one client process and hands their answers back together. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from twinkle_serve import tasks, timing
from twinkle_serve.channel import Channel
from twinkle_serve.data_format.call_messages import CONTROLS, Answer, AnswerItem, CallMessage, ControlCall, SentCall
from twinkle_serve.errors import RequestError, ServiceError, TwinkleServeError, one_line
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.tasks import BackgroundTasks

logger = logging.getLogger(__name__)

LINGER_S = 1.0
"""How long a session stays open when nothing runs. Serve waits for it before it ends the router's process."""

FIRST_CALL_S = 30.0
"""How long it stays open for the first one."""

GATHER_S = 0.004
"""How long an answer waits for others while further calls run."""


class CallerSession:
    """The calls that one client process sends in one session.

    Guarantees:
        Answers of a call come in order, each once; the last one says so.
        The last message is empty. Without it, the client knows that the connection was lost.
    """

    def __init__(self, router: RouterAPI) -> None:
        """Binds to the running event loop."""
        self._router = router
        self.channel: Channel[list[Answer], CallMessage] = Channel(self._take, self._end)
        """The router's side of the connection."""
        self._tasks = BackgroundTasks()
        self._running: dict[int, asyncio.Task[None]] = {}
        """Calls by number."""
        self._answers: list[Answer] = []
        self._begun = self._over = self._last = False
        self._changed = asyncio.Event()
        self._sent = asyncio.Event()
        """Set while no answer waits for the connection."""

    def _take(self, message: CallMessage) -> None:
        """Takes the client's next message; ignored once the session is over: its calls are sent in the next one."""
        if self._over:
            return
        self._begun, self._last = True, message.last
        for call in message.calls:
            self._running[call.number] = self._tasks.spawn(self._run(call))
        for number in message.abandoned:
            if (task := self._running.pop(number, None)) is not None:
                task.cancel()
        self._changed.set()

    def _end(self) -> None:
        """Ends the session, because its client is gone, or has lost the connection and sends its calls again."""
        self._over = True
        self._changed.set()

    async def _run(self, call: SentCall) -> None:
        error: TwinkleServeError | None = None
        try:
            request = call.request()
            if isinstance(request, ControlCall):
                self._put(Answer(call.number, await self._control(request), last=True))
                return
            match call.kind:
                case "run":
                    answer = Answer(call.number, await self._router.run(request), last=True)
                    self._put(answer)
                    return
                case "run_iter":
                    await self._put_all(call.number, self._router.run_iter(request))
                case "run_updates":
                    await self._put_all(call.number, self._router.run_updates(request), as_sent=True)
                case "run_stream":
                    await self._put_all(call.number, self._router.run_stream(request))
        except TwinkleServeError as raised:
            error = raised.with_traceback(None)  # its frames hold the request
            logger.warning(f"call failed: {one_line(error)}")
        except asyncio.CancelledError:
            if tasks.is_cancelled():
                raise
            error = ServiceError("the call was cancelled in the router, by nobody who waits for it. Send it again.")
        except Exception as bug:
            logger.exception("a call failed by a bug in the router")
            error = ServiceError(f"a bug in the router: {type(bug).__name__}: {bug}")
        self._put(Answer(call.number, error=error, last=True))

    async def _control(self, call: ControlCall) -> str:
        if call.method not in CONTROLS:
            raise RequestError(f"{call.method!r} is not called over this connection.")
        answer: str = await getattr(self._router, call.method)(*call.arguments)
        return answer

    async def _put_all(self, number: int, items: AsyncGenerator[AnswerItem, None], *, as_sent: bool = False) -> None:
        """Puts all items of a call.

        Args:
            as_sent: take the next item when the connection has room, since items that wait in the router are joined.
        """
        async with contextlib.aclosing(items):
            async for item in items:
                self._put(Answer(number, item))
                if as_sent:
                    await self._sent.wait()

    def _put(self, answer: Answer) -> None:
        if answer.call not in self._running:
            return
        self._answers.append(answer)
        self._sent.clear()
        if answer.last:
            del self._running[answer.call]
        self._changed.set()

    async def run(self) -> None:
        """Sends answers as calls end, until nothing has run for LINGER_S, the client has sent its last message, or its
        connection has ended. Calls that still run are cancelled then."""
        try:
            while await self._something_is_due():
                answers, self._answers = self._answers, []
                self.channel.send(answers)
                await self.channel.drain()
                if not self._answers:
                    self._sent.set()
            self._over = True
            if self.channel.connected:
                self.channel.send([])  # the client closes the connection
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timing.CALL_LEASE_S):
                        await self.channel.ended.wait()
        finally:
            self._over = True
            self.channel.close()
            self._running.clear()
            self._tasks.cancel()

    async def _something_is_due(self) -> bool:
        while not self._over:
            self._changed.clear()
            if self._answers:
                if self._running:
                    await asyncio.sleep(GATHER_S)
                return True
            wait_s: float | None
            if self._running:
                wait_s = None
            elif self._last:
                return False
            else:
                wait_s = LINGER_S if self._begun else FIRST_CALL_S
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                if not (self._running or self._answers or self.channel.receiving):
                    return False
        return False
