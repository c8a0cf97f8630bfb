"""An HTTP client that costs little: one asyncio protocol for each connection, parsed by httptools, kept alive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

END = None
"""Ends the chunks of a response."""


class HTTPStatusError(Exception):
    """A response whose status is not 200."""


class _Connection(asyncio.Protocol):
    """A connection that answers one request at a time."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by type

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._chunks.put_nowait(END)

    def on_body(self, body: bytes) -> None:
        self._chunks.put_nowait(body)

    def on_message_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.transport.close()
        self._chunks.put_nowait(END)
        self._parser = httptools.HttpResponseParser(self)

    async def chunks(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Sends a request, and yields the body of its response as it comes.

        Raises:
            ConnectionError: the connection ended before the response did.
        """
        self.status = 0
        self.transport.write(request)
        while (chunk := await self._chunks.get()) is not END:
            yield chunk
        if not self.status:
            raise ConnectionError("the connection ended before the response did.")


class HTTPClient:
    """Sends JSON to one server; opens as many connections as there are requests at a time."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._prefix = str(parts.hostname), parts.port or 80, parts.path.rstrip("/")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> HTTPClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.transport.close()

    async def post(self, path: str, body: object, accept: str = "application/json") -> bytes:
        """Returns the body of the answer. Raises HTTPStatusError."""
        async with aclosing(self.stream(path, body, accept)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def post_json(self, path: str, body: object) -> Any:
        return json.loads(await self.post(path, body))

    async def stream(self, path: str, body: object, accept: str = "*/*") -> AsyncGenerator[bytes, None]:
        """Yields the body of the answer in the pieces in which it comes.

        Raises:
            HTTPStatusError: the status is not 200; raised at the end.
        """
        connection = await self._connection()
        last = b""
        async with aclosing(connection.chunks(self._request(path, body, accept))) as chunks:
            async for last in chunks:
                yield last
        self._idle.append(connection)
        if connection.status != 200:
            raise HTTPStatusError(f"{path}: {connection.status} {last[:2000]!r}")

    async def events(self, path: str, body: object) -> AsyncGenerator[bytes, None]:
        """Yields the data of server-sent events, `[DONE]` left out."""
        rest = b""
        async with aclosing(self.stream(path, body, "text/event-stream")) as chunks:
            async for chunk in chunks:
                *events, rest = (rest + chunk).split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: ") and event != b"data: [DONE]":
                        yield event[6:]

    async def _connection(self) -> _Connection:
        while self._idle:
            if not (connection := self._idle.pop()).lost and not connection.transport.is_closing():
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection

    def _request(self, path: str, body: object, accept: str) -> bytes:
        data = json.dumps(body).encode()
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\naccept: {accept}\r\n"
            f"{self._headers}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data
