"""Messages over a connection: in order, whole, and only with the key."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from tests.support.unreadable import Unreadable
from twinkle_serve import channel as module
from twinkle_serve.channel import OUT_OF_BAND_BYTES, Address, Channel, Listener, connect


class Side:
    """One side, and the messages that it has taken."""

    def __init__(self) -> None:
        self.taken: asyncio.Queue[Any] = asyncio.Queue()
        self.ends = 0
        self.channel: Channel[Any, Any] = Channel(self.taken.put_nowait, self._end)

    def _end(self) -> None:
        self.ends += 1


class Pair:
    """Two sides that are connected."""

    def __init__(self) -> None:
        self.listener = Listener()
        self.here, self.there = Side(), Side()
        self.address: Address

    async def start(self) -> None:
        await self.listener.start("127.0.0.1")
        self.address = self.listener.expect(self.there.channel)
        await connect(self.address, self.here.channel)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    await made.start()
    yield made
    made.here.channel.close()
    made.there.channel.close()
    made.listener.close()


async def test_messages_of_any_size_arrive_in_order_both_ways(pair: Pair) -> None:
    rng = np.random.default_rng(0)
    messages: list[Any] = ["first", rng.bytes(3_000_000), {"a": [rng.random(OUT_OF_BAND_BYTES), None]}, ()] * 3
    for message in messages:
        pair.here.channel.send(message)
        pair.there.channel.send(message)
    for side in (pair.here, pair.there):
        for message in messages:
            assert pickle.dumps(await side.taken.get()) == pickle.dumps(message)


async def test_message_that_comes_byte_by_byte_is_taken_once_it_is_whole(pair: Pair) -> None:
    sent: list[bytes] = []
    transport, pair.here.channel._transport = pair.here.channel._transport, Mock(writelines=sent.extend)
    pair.here.channel.send({"tokens": np.ones(OUT_OF_BAND_BYTES, np.uint8)})
    pair.here.channel.send("next")
    pair.here.channel._transport = transport
    for byte in b"".join(sent):
        pair.there.channel.data_received(bytes([byte]))
    assert (await pair.there.taken.get())["tokens"].sum() == OUT_OF_BAND_BYTES
    assert await pair.there.taken.get() == "next"


async def test_what_was_sent_before_the_end_arrives(pair: Pair) -> None:
    """The side that closes is not told of the end; the other one is, once."""
    for number in range(100):
        pair.there.channel.send((number, b"x" * 100_000))
    pair.there.channel.close()
    await pair.here.channel.ended.wait()
    assert [pair.here.taken.get_nowait()[0] for _ in range(100)] == list(range(100))
    pair.here.channel.send("too late")
    pair.here.channel.close()
    assert (pair.here.ends, pair.there.ends) == (1, 0)


async def test_sender_waits_for_a_slow_reader(pair: Pair) -> None:
    pair.here.channel._transport.pause_reading()
    pair.there.channel.send(b"x" * 50_000_000)
    waiting = asyncio.ensure_future(pair.there.channel.drain())
    done, _ = await asyncio.wait({waiting}, timeout=0.1)
    assert not done
    pair.here.channel._transport.resume_reading()
    await waiting
    assert len(await pair.here.taken.get()) == 50_000_000


@pytest.mark.parametrize("again", [False, True])
async def test_key_is_for_one_connection(pair: Pair, again: bool) -> None:
    """A stranger is cut off before anything that it sends is read; the connection with the key goes on."""
    address = pair.address if again else replace(pair.address, key=bytes(module.KEY_BYTES))
    with pytest.raises(ConnectionRefusedError):
        await connect(address, Side().channel)
    pair.here.channel.send("it is me")
    assert await pair.there.taken.get() == "it is me" and pair.there.taken.empty()


async def test_channel_takes_nothing_from_one_that_does_not_know_the_reply(pair: Pair) -> None:
    """Such as a process that has got the port of one that has ended."""
    side = Side()
    address = replace(pair.listener.expect(Side().channel), reply=bytes(module.KEY_BYTES))
    with pytest.raises(ConnectionRefusedError):
        await connect(address, side.channel)
    assert not side.channel.connected


async def test_message_that_cannot_be_read_ends_the_connection(pair: Pair) -> None:
    """With its error on the side that cannot read it."""
    pair.here.channel.send(Unreadable())
    await pair.here.channel.ended.wait()
    assert isinstance(pair.there.channel.error, ImportError) and pair.here.channel.error is None
    assert (pair.here.ends, pair.there.ends) == (1, 1)


async def test_fork_does_not_hold_the_connection(pair: Pair) -> None:
    """It lives on when its parent ends the connection, or is killed."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        # The system ends a connection once no process holds it.
        pair.here.channel.close()
        async with asyncio.timeout(60):
            await pair.there.channel.ended.wait()
    finally:
        os.close(writer)
        await asyncio.to_thread(os.waitpid, child, 0)


async def test_stranger_without_a_word_is_cut_off(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.05)
    reader, writer = await asyncio.open_connection(pair.address.host, pair.address.port)
    writer.write(b"half a key")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()


async def test_nothing_answers_where_nobody_listens(pair: Pair) -> None:
    pair.listener.close()
    with pytest.raises(OSError):
        await connect(pair.address, Side().channel)


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's variables, with a certificate that is its own authority."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=cluster -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(tmp_path / "cert.pem"))
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(tmp_path / "key.pem"))
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(tmp_path / "cert.pem"))


async def test_connections_are_encrypted_where_rays_are(certificate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    await pair.start()
    assert pair.here.channel._transport.get_extra_info("cipher")
    pair.here.channel.send(b"x" * 1_000_000)
    assert len(await pair.there.taken.get()) == 1_000_000
    monkeypatch.setitem(os.environ, "RAY_USE_TLS", "0")
    with pytest.raises(ConnectionRefusedError):
        await connect(pair.listener.expect(Side().channel), Side().channel)
    pair.here.channel.close()
    pair.there.channel.close()
    pair.listener.close()
