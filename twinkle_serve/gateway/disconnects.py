"""Ends a request when its client goes away: the servers of ASGI applications do not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class EndsWithClient:
    """Middleware: cancels the application once its client is gone.

    Guarantees:
        Nothing is read ahead of the application, up to the end of the body.
        A request whose answer is complete, or whose client stays, is not touched.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watch = _Watch(receive, send)
        running = asyncio.ensure_future(self._app(scope, watch.receive, watch.send))
        watch.on_gone = running.cancel
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            if not (watch.gone and running.done()):  # the server ends this request
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running
                raise
        finally:
            watch.close()


class _Watch:
    """The messages of one request."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._next: asyncio.Future[Message] | None = None
        """The message behind the body: that the client is gone."""
        self._answered = False
        self.gone = False
        self.on_gone: Callable[[], object] = lambda: None

    async def receive(self) -> Message:
        """Receives a message. From the end of the body on, waits for the client to go."""
        if self._next is not None:
            return await asyncio.shield(self._next)
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
        elif not message.get("more_body", False):
            self._next = asyncio.ensure_future(self._receive())
            self._next.add_done_callback(self._ended)
        return message

    async def send(self, message: Message) -> None:
        """Sends a message."""
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._answered = True
        await self._send(message)

    def _ended(self, message: asyncio.Future[Message]) -> None:
        if message.cancelled() or message.exception() is not None:
            return
        self.gone = message.result()["type"] == "http.disconnect"
        if self.gone and not self._answered:
            self.on_gone()

    def close(self) -> None:
        """Stops waiting."""
        if self._next is not None:
            self._next.cancel()
