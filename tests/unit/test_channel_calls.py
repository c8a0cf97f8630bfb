"""Calls over a connection: each has its own answer or error, and none waits for a connection that is gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.unreadable import Unreadable
from twinkle_serve.channel import Address, Listener
from twinkle_serve.channel_calls import MethodClient, MethodServer
from twinkle_serve.errors import ServiceError, SessionError


class Service:
    """An object whose methods are called, and the connections to it."""

    def __init__(self) -> None:
        self.listener = Listener()
        self.servers: list[MethodServer] = []
        self.release = asyncio.Event()
        self.refuses = False
        self.client = MethodClient(self.address)

    async def address(self) -> Address:
        await self.listener.start("127.0.0.1")
        self.servers.append(MethodServer({name: getattr(self, name) for name in ("add", "wait", "fail", "give")}))
        address = self.listener.expect(self.servers[-1].channel)
        if self.refuses:
            self.listener.forget(address)
        return address

    async def add(self, a: int, b: int) -> int:
        return a + b

    async def wait(self, value: str) -> str:
        await self.release.wait()
        return value

    async def fail(self, error: Exception) -> None:
        raise error

    async def give(self, what: str) -> Any:
        return {"unreadable": Unreadable(), "unsendable": threading.Lock()}[what]


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made = Service()
    yield made
    made.release.set()
    for server in made.servers:
        server.channel.close()
    made.listener.close()


async def test_calls_at_the_same_time_share_a_connection_and_have_their_own_answers(service: Service) -> None:
    answers = await asyncio.gather(*(service.client.call("add", i, 1) for i in range(100)))
    assert answers == list(range(1, 101))
    assert len(service.servers) == 1


async def test_slow_call_holds_up_no_other(service: Service) -> None:
    slow = asyncio.ensure_future(service.client.call("wait", "slow"))
    assert await service.client.call("add", 1, 2) == 3
    assert not slow.done()
    service.release.set()
    assert await slow == "slow"


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        pytest.param(SessionError("gone"), pytest.raises(SessionError, match="gone"), id="ours"),
        pytest.param(KeyError("x"), pytest.raises(ServiceError, match="a bug in fail: KeyError: 'x'"), id="a bug"),
    ],
)
async def test_error_is_that_of_its_call_alone(service: Service, raised: Exception, error: Any) -> None:
    with error:
        await service.client.call("fail", raised)
    assert await service.client.call("add", 1, 2) == 3
    assert len(service.servers) == 1


async def test_calls_end_with_their_connection_and_the_next_one_makes_another(service: Service) -> None:
    calls = [asyncio.ensure_future(service.client.call("wait", "x")) for _ in range(3)]
    await service.client.call("add", 1, 2)
    service.servers[0].channel.close()
    assert all(isinstance(each, ConnectionError) for each in await asyncio.gather(*calls, return_exceptions=True))
    assert await service.client.call("add", 1, 2) == 3
    assert len(service.servers) == 2


async def test_call_without_a_connection_says_where_nothing_answers(service: Service) -> None:
    service.refuses = True
    refused = await asyncio.gather(*(service.client.call("add", 1, 2) for _ in range(3)), return_exceptions=True)
    assert all("no connection to 127.0.0.1:" in str(each) and isinstance(each, ConnectionError) for each in refused)
    service.refuses = False
    assert await service.client.call("add", 1, 2) == 3


@pytest.mark.parametrize(("what", "error"), [("unreadable", "cannot be read here"), ("unsendable", "a bug in give")])
async def test_answer_that_cannot_be_sent_or_read_is_an_error(service: Service, what: str, error: str) -> None:
    with pytest.raises(ServiceError, match=error):
        await service.client.call("give", what)
    assert await service.client.call("add", 1, 2) == 3


async def test_abandoned_call_leaves_the_others(service: Service) -> None:
    call = asyncio.ensure_future(service.client.call("wait", "x"))
    await service.client.call("add", 1, 2)
    call.cancel()
    service.release.set()
    assert await service.client.call("wait", "y") == "y"
