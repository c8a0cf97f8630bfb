"""Server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from twinkle_serve.gateway.errors import Failure, Protocol
from twinkle_serve.gateway.json_response import dumps

KEEP_ALIVE_S = 15.0
"""A comment is sent after so long without an event: proxies end connections that are silent."""

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Keeps proxies from gathering the events."""


def event(data: object, name: str | None = None) -> bytes:
    """Returns an event of JSON; with a name, as Anthropic's clients expect it."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dumps(data) + b"\n\n"


class EventStream(Response):
    """Sends events as they come. An exception becomes the stream's last event, in the protocol's form.

    Guarantees:
        When the client goes away, or the request is cancelled, the generator is closed at once.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], first: bytes, protocol: Protocol) -> None:
        super().__init__(media_type="text/event-stream", headers=HEADERS)
        del self.headers["content-length"]
        self._events, self._first, self._protocol = events, first, protocol

    @classmethod
    async def begin(cls, events: AsyncGenerator[bytes, None], protocol: Protocol) -> EventStream:
        """Waits for the first event: exceptions before it become an ordinary answer with their status."""
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        return cls(events, first, protocol)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send(send, self._first)
            try:
                async with contextlib.aclosing(_with_comments(events)) as chunks:
                    async for chunk in chunks:
                        await _send(send, chunk)
            except Exception as error:
                await _send(send, _error_event(error, self._protocol))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _with_comments(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yields events, and a comment whenever none has come for KEEP_ALIVE_S."""
    while True:
        following = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait({following}, timeout=KEEP_ALIVE_S))[0]:
                yield COMMENT
        except BaseException:
            following.cancel()
            with contextlib.suppress(BaseException):
                await following
            raise
        if (chunk := following.result()) is None:
            return
        yield chunk


def _error_event(error: Exception, protocol: Protocol) -> bytes:
    failure: Mapping[str, Any] = Failure.of(error).body(protocol)
    if protocol == "anthropic":
        return event(failure, "error")
    return event(failure) + (DONE if protocol == "openai" else b"")
