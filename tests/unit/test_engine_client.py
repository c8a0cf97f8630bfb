"""How the router hands chunks to an engine's deployment: by messages without an answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ObjectLostError

from deployments.engine_client import ServeEngineClient
from tests.support.harness import started
from tests.support.inboxes import Actor
from twinkle_serve.channel import Listener
from twinkle_serve.channel_calls import MethodServer
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import Chunk, Group, Session
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import AdapterError, EngineDeadError
from twinkle_serve.remote import inbox
from twinkle_serve.remote.inbox import Address, Inbox
from twinkle_serve.routing.adapters import read_directory


def groups(*ids: int) -> list[Group]:
    return [Group(id=i, prompt_ids=np.array([40, 41], np.int32), params=DecodingParams(max_tokens=2)) for i in ids]


class Handle:
    """A handle of a deployment whose `address` ends so; its streams are those of a server in this process."""

    def __init__(self, address: Callable[[Session], Awaitable[Address[Chunk]]], server: EngineServer | None) -> None:
        self.address = Mock(remote=address)
        self._server = server

    def options(self, **_: Any) -> Any:
        return Mock(results=Mock(remote=lambda session: self._results(session)))

    async def _results(self, session: Session) -> AsyncIterator[Any]:
        assert self._server is not None
        async with contextlib.aclosing(self._server.results(session)) as items:
            async for item in items:
                yield item


class Service:
    """An engine's server, and a client that reaches it by messages, as through Serve."""

    def __init__(self, server: EngineServer, incarnation: str) -> None:
        self.actor = Actor()
        self.session = Session(incarnation=incarnation, router="router")

        async def address(session: Session) -> Address[Chunk]:
            server._lease_of(session)
            return Address(self.actor, Inbox(server.take, partial(server.chunk_was_lost, session)).name)

        handle: Any = Handle(address, server)
        self.client = ServeEngineClient(handle)

    async def sampled(self) -> set[int]:
        """Ids of the groups whose samples the engine returns until it is idle."""
        return {
            group
            async for finished in self.client.results(self.session)
            if finished.columns is not None
            for group in finished.columns.group.tolist()
        }


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with started("fake") as harness:
        info = await harness.server.describe("router")
        yield Service(harness.server, info.incarnation)


async def test_chunks_arrive_by_messages(service: Service) -> None:
    await service.client.submit(service.session, groups(1, 2))
    await service.client.submit(service.session, groups(3))
    assert await service.sampled() == {1, 2, 3}


async def test_chunks_that_overtake_each_other_are_all_sampled(service: Service) -> None:
    """Ray runs a large one after smaller ones that were sent later."""
    service.actor.overtaken = 2
    for i in range(4):
        await service.client.submit(service.session, groups(i))
    assert await service.sampled() == {0, 1, 2, 3}


async def test_lost_chunk_ends_the_use_of_the_engine(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its router places all groups of this session anew; nothing waits for the lost ones until a deadline."""
    monkeypatch.setattr(inbox, "LOST_S", 0.1)
    await service.client.submit(service.session, groups(1))
    service.actor.loses = 1
    await service.client.submit(service.session, groups(2))
    await service.client.submit(service.session, groups(3))
    with pytest.raises(EngineDeadError, match="a chunk was lost"):
        await service.sampled()


async def test_next_session_counts_anew(service: Service) -> None:
    """After a lost chunk the router begins another one with the same process."""
    service.actor.loses = 1
    await service.client.submit(service.session, groups(1))
    await service.client.submit(service.session, groups(2))
    service.session = Session(incarnation=service.session.incarnation, router="router", epoch=1)
    await service.client.submit(service.session, groups(1, 2))
    assert await service.sampled() == {1, 2}


async def test_first_chunks_of_a_session_may_be_sent_at_the_same_time(service: Service) -> None:
    await asyncio.gather(*(service.client.submit(service.session, groups(i)) for i in range(4)))
    assert await service.sampled() == {0, 1, 2, 3}


async def test_chunk_of_a_session_that_is_over_is_dropped(service: Service) -> None:
    """As of an earlier life of the process; its router hears it from `results`."""
    old, service.session = service.session, Session(incarnation="earlier", router="router")
    with pytest.raises(EngineDeadError, match="was restarted"):
        await service.client.submit(service.session, groups(1))
    service.session = old
    assert await service.sampled() == set()


async def test_engine_whose_process_is_gone_takes_no_chunk() -> None:
    async def dead(session: Session) -> Address[Chunk]:
        raise ActorDiedError

    handle: Any = Handle(dead, None)
    with pytest.raises(EngineDeadError):
        await ServeEngineClient(handle).submit(Session(incarnation="life", router="router"), groups(1))


class AdapterService:
    """An engine's server behind a handle and a connection, and the calls that it gets."""

    def __init__(self, server: Any, *, connects: bool) -> None:
        self.by_handle = self.by_connection = 0
        self._server, self._connects, self._listener = server, connects, Listener()
        handle: Any = self
        self.client = ServeEngineClient(handle)

    def options(self, **_: Any) -> Any:
        return self

    @property
    def load_adapter(self) -> Any:
        return Mock(remote=self._by_handle)

    async def _by_handle(self, *arguments: Any) -> None:
        self.by_handle += 1
        await self._server.load_adapter(*arguments)

    async def _by_connection(self, *arguments: Any) -> None:
        self.by_connection += 1
        await self._server.load_adapter(*arguments)

    @property
    def control_address(self) -> Any:
        return Mock(remote=self._address)

    async def _address(self) -> Any:
        address = await self._listener.open("127.0.0.1", MethodServer({"load_adapter": self._by_connection}).channel)
        if not self._connects:
            self._listener.forget(address)
        return address


def referring(files: AdapterFiles) -> list[Any]:
    """As a reference to files in Ray's object store."""
    reference: asyncio.Future[AdapterFiles] = asyncio.get_running_loop().create_future()
    reference.set_result(files)
    return [reference]


@pytest.mark.parametrize(
    ("connects", "small", "counts"), [(True, True, (1, 0)), (False, True, (0, 1)), (True, False, (0, 1))]
)
async def test_adapter_is_loaded_over_a_connection_where_there_is_one(
    adapters: list[Path], connects: bool, small: bool, counts: tuple[int, int]
) -> None:
    """By the handle else, which tells why an engine does not answer, and for references, which Ray counts."""
    files = read_directory(str(adapters[0]))[0]
    async with started("fake") as harness:
        service = AdapterService(harness.server, connects=connects)
        version = AdapterVersion(name="red", version=1, id=1, rank=8)
        await service.client.load_adapter(version, files if small else referring(files))
        assert (service.by_connection, service.by_handle) == counts
        assert set(harness.server._adapters) == {1}


async def test_engine_says_over_the_connection_why_it_refuses_an_adapter(adapters: list[Path]) -> None:
    files = read_directory(str(adapters[0]))[0]
    async with started("fake") as harness:
        service = AdapterService(harness.server, connects=True)
        with pytest.raises(AdapterError, match="has rank 999"):
            await service.client.load_adapter(AdapterVersion(name="red", version=1, id=1, rank=999), files)
        assert service.by_handle == 0


async def test_files_that_come_with_the_call_are_not_fetched(adapters: list[Path]) -> None:
    """From the store, but where they cannot be had any more: the process that shared them is gone."""
    files = read_directory(str(adapters[0]))[0]
    async with started("fake") as harness:
        await harness.server.load_adapter(AdapterVersion(name="red", version=1, id=1, rank=8), referring(files))
        lost = referring(files)
        lost[0] = asyncio.get_running_loop().create_future()
        lost[0].set_exception(ObjectLostError("id", None, ""))
        harness.files.by_id[2] = files
        await harness.server.load_adapter(AdapterVersion(name="red", version=2, id=2, rank=8), lost)
        assert set(harness.server._adapters) == {1, 2}
