"""A handle of a router that answers as it is told, through real sessions of calls."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from typing import Any
from unittest.mock import Mock

from twinkle_serve.channel import Channel, Listener
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.call_messages import CallMessage
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.routing.caller_session import CallerSession


class Response:
    """A response of a control call that ends in a value or an error."""

    def __init__(self, end: Any) -> None:
        self._end = end

    def __await__(self) -> Generator[None, None, Any]:
        yield
        if isinstance(self._end, BaseException):
            raise self._end
        return self._end

    def cancel(self) -> None:
        pass


class RouterHandle:
    """A handle whose calls all end alike."""

    def __init__(self, end: Any) -> None:
        """
        Args:
            end: what a call returns, an error, or a function of its arguments, async or not, that returns either. A
                TwinkleServeError is the router's answer; with another error the router's process is gone.
        """
        self._end = end
        self.sessions = 0
        """Number of sessions that were opened."""
        self.messages = 0
        """Number of messages that came."""
        self.channel: Channel[Any, Any]
        """That of the last session."""

    def options(self, **options: Any) -> RouterHandle:
        return self

    @property
    def run(self) -> Any:
        """Calls whose inputs hold references."""

        async def run(request: SampleRequest) -> Any:
            router: Any = _Router(self._end, asyncio.get_running_loop().create_future())
            return await router.run(request)

        return Mock(remote=lambda request: asyncio.ensure_future(run(request)))

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any, **options: Any) -> Any:
            return Response(self._end(*args, **options) if callable(self._end) else self._end)

        return Mock(remote=remote)

    @property
    def answers(self) -> Any:
        return Mock(remote=self._answers)

    async def _answers(self) -> AsyncIterator[Any]:
        self.sessions += 1
        died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        router: Any = _Router(self._end, died)
        session = CallerSession(router)
        self.channel = session.channel
        take = session.channel._take

        def count(message: CallMessage) -> None:
            self.messages += 1
            take(message)

        session.channel._take = count
        listener = Listener()
        await listener.start("127.0.0.1")
        yield listener.expect(session.channel)
        running = asyncio.ensure_future(session.run())
        try:
            await asyncio.wait([running, died], return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                died.result()
        finally:
            running.cancel()
            listener.close()


class _Router:
    """Samples as `RouterHandle` is told."""

    def __init__(self, end: Any, died: asyncio.Future[None]) -> None:
        self._end, self._died = end, died

    async def run(self, request: SampleRequest) -> Any:
        end = self._end(request) if callable(self._end) else self._end
        if inspect.isawaitable(end):
            end = await end
        if isinstance(end, TwinkleServeError):
            raise end
        if isinstance(end, BaseException):
            if not self._died.done():
                self._died.set_exception(end)
            await asyncio.Event().wait()
        return end

    async def add_adapter(self, name: str, source: Any) -> Any:
        return await self.run(source)

    async def run_iter(self, request: SampleRequest) -> AsyncGenerator[SampleResponse, None]:
        yield await self.run(request)

    async def run_updates(self, request: SampleRequest) -> AsyncGenerator[UpdatesItem, None]:
        """The items that it is told, of which an error ends it as it ends `run`."""
        for item in self._end(request):
            if isinstance(item, BaseException):
                await _Router(item, self._died).run(request)
            yield item
