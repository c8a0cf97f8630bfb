"""Messages between two processes over a connection of their own.

A message to an actor, or an item of a stream of Serve, takes 1.4 to 3.6 ms of CPU in both processes together, several
times as much as over a connection (docs/decisions/016). Messages are pickled, so each side reads them only after the
other has shown a key that both got through Ray.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pickle
import secrets
import socket
import ssl
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

Sent = TypeVar("Sent")
Taken = TypeVar("Taken")

CONNECT_S = 10.0
"""How long a connection may take to be made, and to show its key."""

SILENCE_S = 60.0
"""The system ends a connection whose other side has acknowledged nothing for this time."""

OUT_OF_BAND_BYTES = 2**14
"""Arrays of this size are not copied into the pickle."""

KEY_BYTES = 32
"""Of the key that either side shows."""

_COUNT = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect to, and the keys of one connection."""

    host: str
    port: int
    key: bytes = field(repr=False)
    """Shown by the side that connects."""
    reply: bytes = field(repr=False)
    """Shown by the other side."""


class Channel(asyncio.Protocol, Generic[Sent, Taken]):
    """One side of a connection.

    Guarantees:
        Messages arrive in order, each once, until the channel has ended.
        Messages sent before `close` still arrive, unless the other side sends something meanwhile.
    """

    def __init__(self, take: Callable[[Taken], None], on_end: Callable[[], None]) -> None:
        """
        Args:
            take: called with each message, on the event loop of the channel.
            on_end: called when the connection has ended, unless by `close` of this side.
        """
        self._take, self._on_end = take, on_end
        self._transport: Any = None
        self._received = bytearray()
        self._closed = False
        self._writable = asyncio.Event()
        self._writable.set()
        self.ended = asyncio.Event()
        """Set when the connection has ended."""
        self.error: Exception | None = None
        """What ended the connection on this side: a message that could not be read."""

    @property
    def connected(self) -> bool:
        return self._transport is not None and not self.ended.is_set()

    @property
    def receiving(self) -> bool:
        """Whether a message has arrived in part."""
        return bool(self._received)

    def send(self, message: Sent) -> None:
        """Sends a message; dropped if the connection has ended. Raises exceptions of pickling."""
        buffers: list[pickle.PickleBuffer] = []

        def in_band(buffer: pickle.PickleBuffer) -> bool:
            if buffer.raw().nbytes < OUT_OF_BAND_BYTES:
                return True
            buffers.append(buffer)
            return False

        parts: list[Any] = [pickle.dumps(message, protocol=5, buffer_callback=in_band)]
        parts += [buffer.raw() for buffer in buffers]
        sizes = struct.pack(f"!I{len(parts)}Q", len(parts), *(len(part) for part in parts))
        if self.connected:
            self._transport.writelines([sizes, *parts])

    async def drain(self) -> None:
        """Waits until the send buffer has room, or the connection has ended."""
        await self._writable.wait()

    def close(self) -> None:
        """Ends the connection when everything has been sent. Idempotent."""
        self._closed = True
        if self._transport is None:
            self.ended.set()
        else:
            self._transport.close()

    # -- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        _connected.add(self)
        _notice_silence(transport.get_extra_info("socket"))
        if self._closed:
            transport.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (parts := self._next_parts()) is not None:
            try:
                message = pickle.loads(parts[0], buffers=parts[1:])
            except Exception as error:  # such as a module that this process lacks
                self.error = error
                self._transport.abort()
                return
            self._take(message)

    def _next_parts(self) -> list[bytes] | None:
        """Removes the next message from the buffer and returns its parts; None if it is incomplete."""
        received = self._received
        if len(received) < _COUNT.size:
            return None
        (count,) = _COUNT.unpack_from(received)
        start = _COUNT.size + 8 * count
        if len(received) < start:
            return None
        ends = [start]
        for size in struct.unpack_from(f"!{count}Q", received, _COUNT.size):
            ends.append(ends[-1] + size)
        if len(received) < ends[-1]:
            return None
        with memoryview(received) as view:
            parts = [bytes(view[begin:end]) for begin, end in itertools.pairwise(ends)]
        del received[: ends[-1]]
        return parts

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        _connected.discard(self)
        self._writable.set()
        if not self.ended.is_set():
            self.ended.set()
            if not self._closed:
                self._on_end()


class Listener:
    """Accepts connections for the channels of this process."""

    def __init__(self) -> None:
        self._expected: dict[bytes, tuple[bytes, Channel[Any, Any]]] = {}
        """Reply and channel, by key, of connections that are to come."""
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()
        self._host = ""
        self._port = 0

    async def start(self, host: str) -> None:
        """Listens on an address of this machine, on a port that the system chooses. Idempotent.

        With RAY_USE_TLS, connections are encrypted with Ray's certificates.
        """
        async with self._starting:
            if self._server is None:
                try:
                    self._server = await self._listen(host)
                except OSError as error:  # others reach this machine by an address that it does not have itself
                    logger.warning(f"cannot listen on {host} ({error}); listening on every interface")
                    self._server = await self._listen("0.0.0.0")
                self._host, self._port = host, self._server.sockets[0].getsockname()[1]

    async def _listen(self, host: str) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: _Handshake(self._welcome), host, 0, ssl=_tls(server=True))

    def expect(self, channel: Channel[Any, Any]) -> Address:
        """Returns the address for the other side of a channel."""
        key, reply = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        self._expected[key] = reply, channel
        return Address(self._host, self._port, key, reply)

    async def open(self, host: str, channel: Channel[Any, Any]) -> Address:
        """Listens, and expects a channel for a while: twice as long as its other side may take to connect."""
        await self.start(host)
        address = self.expect(channel)
        asyncio.get_running_loop().call_later(2 * CONNECT_S, self.forget, address)
        return address

    def forget(self, address: Address) -> None:
        """Expects nobody any more at an address."""
        self._expected.pop(address.key, None)

    def close(self) -> None:
        """Accepts no more connections."""
        if self._server is not None:
            self._server.close()

    def _welcome(self, key: bytes, transport: Any) -> Channel[Any, Any] | None:
        reply, channel = self._expected.pop(key, (b"", None))
        if channel is None:
            logger.warning(f"a connection from {transport.get_extra_info('peername')} without a valid key is refused")
        transport.write(reply)
        return channel


async def connect(address: Address, channel: Channel[Any, Any]) -> None:
    """Connects a channel.

    Raises:
        OSError: nothing answers there, not within CONNECT_S, or without the key.
    """

    def welcome(key: bytes, transport: Any) -> Channel[Any, Any] | None:
        return channel if secrets.compare_digest(key, address.reply) else None

    async with asyncio.timeout(CONNECT_S):  # a TimeoutError is an OSError
        transport, handshake = await asyncio.get_running_loop().create_connection(
            lambda: _Handshake(welcome), address.host, address.port, ssl=_tls(server=False)
        )
        transport.write(address.key)
        try:
            if not await handshake.succeeded:
                raise ConnectionRefusedError("refused")
        except BaseException:
            transport.abort()
            raise


class _Handshake(asyncio.Protocol):
    """A connection whose other side has not shown its key yet."""

    def __init__(self, welcome: Callable[[bytes, Any], Channel[Any, Any] | None]) -> None:
        """
        Args:
            welcome: returns the channel for a key, given the transport; None for a wrong one.
        """
        self._welcome = welcome
        self._received = b""
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self.succeeded: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(CONNECT_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) < KEY_BYTES:
            return
        channel = self._welcome(self._received[:KEY_BYTES], self._transport)
        if channel is None:
            self._transport.abort()
            return
        self._end(True)
        self._transport.set_protocol(channel)
        channel.connection_made(self._transport)
        if rest := self._received[KEY_BYTES:]:
            channel.data_received(rest)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._end(False)

    def _end(self, succeeded: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.succeeded.done():
            self.succeeded.set_result(succeeded)


_connected: weakref.WeakSet[Channel[Any, Any]] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """Closes the connections in a fork of this process: with its copies they would outlive the parent."""
    null = os.open(os.devnull, os.O_RDWR)
    for channel in list(_connected):
        os.dup2(null, channel._transport.get_extra_info("socket").fileno())  # its number stays taken
    os.close(null)
    _connected.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _notice_silence(connection: socket.socket) -> None:
    """Makes the system end a connection whose other machine is gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(SILENCE_S / 2))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(SILENCE_S / 6))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_S * 1000))


def _tls(*, server: bool) -> ssl.SSLContext | None:
    """Returns Ray's encryption, by its environment variables; None where it is off."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # as Ray: a certificate of this authority is enough
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    context.load_verify_locations(os.environ["RAY_TLS_CA_CERT"])
    return context
