"""Calls of an object's methods over a connection: for calls that are many and short, such as those of sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twinkle_serve import tasks
from twinkle_serve.channel import Address, Channel, connect
from twinkle_serve.errors import ServiceError, TwinkleServeError
from twinkle_serve.tasks import BackgroundTasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MethodCall:
    """One call."""

    number: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """The answer to a call: a value or an error."""

    number: int
    value: Any = None
    error: TwinkleServeError | None = None


class MethodServer:
    """Answers the calls of one client. They run at the same time, and those under way end with this process alone."""

    def __init__(self, methods: Mapping[str, Callable[..., Awaitable[Any]]]) -> None:
        """
        Args:
            methods: coroutine functions, by the names under which they are called.
        """
        self._methods = methods
        self._tasks = BackgroundTasks()
        self.channel: Channel[Returned, MethodCall] = Channel(self._take, lambda: None)

    def _take(self, call: MethodCall) -> None:
        self._tasks.spawn(self._answer(call))

    async def _answer(self, call: MethodCall) -> None:
        try:
            value = await self._methods[call.method](*call.arguments)
            await self.channel.drain()
            self.channel.send(Returned(call.number, value))
        except TwinkleServeError as error:
            self.channel.send(Returned(call.number, error=error.with_traceback(None)))  # its frames hold the arguments
        except Exception as bug:
            logger.exception(f"{call.method} failed by a bug")
            told = ServiceError(f"a bug in {call.method}: {type(bug).__name__}: {bug}")
            self.channel.send(Returned(call.number, error=told))


class MethodClient:
    """Calls the methods of a `MethodServer`, over one connection that it makes when there is none.

    Guarantees:
        A call whose connection ends raises ConnectionError; whether it was carried out is then unknown.
    """

    def __init__(self, address: Callable[[], Awaitable[Address]]) -> None:
        """
        Args:
            address: asks the other side for the address of a new connection. Its errors are those of the calls.
        """
        self._address = address
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None
        self._tasks = BackgroundTasks()

    async def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method. On one event loop.

        Raises:
            ConnectionError: there is no connection, or it has ended before the answer.
            TwinkleServeError: as the method.
        """
        return await (await self._connected()).call(method, arguments)

    async def _connected(self) -> _Connection:
        while (connection := self._connection) is None or not connection.channel.connected:
            if self._connecting is None:
                self._connecting = self._tasks.spawn(self._connect())
            try:
                await asyncio.shield(self._connecting)
            except asyncio.CancelledError:
                if tasks.is_cancelled():
                    raise
                raise ConnectionError("the connection was given up") from None
        return connection

    async def _connect(self) -> _Connection:
        try:
            address = await self._address()
            connection = _Connection()
            try:
                await connect(address, connection.channel)
            except OSError as refused:
                at = f"{address.host}:{address.port}"
                raise ConnectionError(f"no connection to {at}: {refused or 'no answer'}") from refused
            self._connection = connection
            return connection
        finally:
            self._connecting = None


class _Connection:
    """One connection, and the calls under way on it."""

    def __init__(self) -> None:
        self.channel: Channel[MethodCall, Returned] = Channel(self._take, self._end)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._next = 0

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        number, self._next = self._next, self._next + 1
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self.channel.send(MethodCall(number, method, arguments))
            await self.channel.drain()
            return await answer
        finally:
            self._answers.pop(number, None)

    def _take(self, returned: Returned) -> None:
        answer = self._answers.get(returned.number)
        if answer is None or answer.done():
            return
        if returned.error is None:
            answer.set_result(returned.value)
        else:
            answer.set_exception(returned.error)

    def _end(self) -> None:
        unread = self.channel.error
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(
                    ConnectionError("the connection was lost")
                    if unread is None
                    else ServiceError(f"an answer cannot be read here: {type(unread).__name__}: {unread}")
                )
