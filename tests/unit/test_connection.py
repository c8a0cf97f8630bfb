"""Calls of one process share messages to the router, and none is lost with a connection or a session."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from tests.support.eventually import wait_until
from tests.support.responses import columns, response
from tests.support.router_handle import RouterHandle
from tests.support.unreadable import Unreadable
from twinkle_serve.channel import Address, Channel
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.adapters import SMALL_BYTES, AdapterFiles
from twinkle_serve.data_format.inputs import as_list
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import AdapterError, RequestError, ServiceError
from twinkle_serve.routing import caller_session
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler import connection
from twinkle_serve.sampler.client import ServiceClient


def answer(sent: SampleRequest) -> SampleResponse:
    """A response whose sample is the prompt's first token."""
    ids = [item["input_ids"] for item in as_list(sent.inputs) or []]
    return response([columns(i, [chr(prompt[0])]) for i, prompt in enumerate(ids)], [], ids)


class Client:
    """A client of a router that answers so."""

    def __init__(self, end: Any = answer) -> None:
        self.handle = RouterHandle(end)
        handle: Any = self.handle
        self.client = ServiceClient(handle, "sampler")

    def sampled(self, *tokens: int) -> list[str]:
        """Texts of calls of one prompt each, which are made in one turn of the event loop."""

        async def calls() -> list[SampleResponse]:
            requests = (SampleRequest(inputs=[{"input_ids": [token]}], timeout_s=20.0) for token in tokens)
            return await asyncio.gather(*(self.client.run(self.client.prepare(request)) for request in requests))

        return [made.sequences[0].decoded for made in self.client.loop.call(calls())]


TOKENS = range(65, 75)
TEXTS = [chr(token) for token in TOKENS]


def test_calls_of_one_turn_share_a_message() -> None:
    client = Client()
    client.sampled(*TOKENS)
    before = client.handle.messages
    assert client.sampled(*TOKENS) == TEXTS
    assert client.handle.messages == before + 1
    assert client.handle.sessions == 1


def test_calls_of_a_lost_connection_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run, and those that come before the client has noticed."""
    monkeypatch.setattr("twinkle_serve.sampler.client.RETRY_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(ServiceClient, "_is_deployed", lambda self, patience_s: asyncio.sleep(0, True))
    monkeypatch.setattr(connection, "END_S", 0.2)
    begun = threading.Event()
    ends: list[asyncio.Event] = [asyncio.Event()]

    async def slowly(request: SampleRequest) -> SampleResponse:
        begun.set()
        if ends:
            await ends.pop().wait()
        return answer(request)

    client = Client(slowly)
    with ThreadPoolExecutor() as threads:
        call = threads.submit(client.sampled, 65)
        assert begun.wait(60)
        client.client.loop.call(abort(client))
        assert client.sampled(66) == ["B"]
        assert call.result(60) == ["A"]
    assert client.handle.sessions == 2


def test_answer_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not sampled again: it would be no better."""
    answered = []

    def end(request: SampleRequest) -> Any:
        answered.append(request)
        made = answer(request)
        object.__setattr__(made, "logprobs_mode", Unreadable())
        return made

    with pytest.raises(ServiceError, match=r"cannot be read here: ImportError: no module named trainer"):
        Client(end).sampled(65)
    assert len(answered) == 1


def test_message_that_arrives_slowly_keeps_its_session_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller_session, "LINGER_S", 0.0)
    monkeypatch.setattr(caller_session, "FIRST_CALL_S", 0.1)
    arriving = True
    monkeypatch.setattr(Channel, "receiving", property(lambda channel: arriving))
    client = Client()
    assert client.sampled(65) == ["A"]
    session = client.client._connection._current
    assert session is not None and not session.ended
    arriving = False
    wait_until(lambda: session.ended, "it ends")


async def abort(client: Client) -> None:
    """Ends the connection as a broken network does."""
    client.handle.channel._transport.abort()


def test_router_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinkle_serve.sampler.client.RETRY_PAUSES_S", ())

    async def refuse(address: Address, channel: Any) -> None:
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(connection, "connect", refuse)
    with pytest.raises(ServiceError, match=r"no connection to the router at 127.0.0.1:\d+: refused"):
        Client().sampled(65)


def test_next_session_takes_the_place_of_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened beside, with whichever router Serve has by then; no call waits for it."""
    monkeypatch.setattr(connection, "SESSION_S", 0.0)
    client = Client()
    for _ in range(6):
        assert client.sampled(*TOKENS) == TEXTS
    assert client.handle.sessions > 2


def test_call_after_a_long_pause_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the session has ended, and so has the next one, which was opened beside it and never used."""
    monkeypatch.setattr(connection, "SESSION_S", 0.0)
    monkeypatch.setattr(caller_session, "LINGER_S", 0.1)
    monkeypatch.setattr(caller_session, "FIRST_CALL_S", 0.2)
    client = Client()
    calls = client.client._connection
    for _ in range(2):
        for _ in range(2):
            assert client.sampled(65) == ["A"]
        wait_until(lambda: not calls._tasks._tasks, "all sessions have ended")


def test_call_that_comes_as_its_session_ends_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session ends when it is idle, without asking the client."""
    monkeypatch.setattr(caller_session, "LINGER_S", 0.0)
    client = Client()
    for _ in range(50):
        assert client.sampled(65) == ["A"]


def test_caller_that_gives_up_ends_its_call_in_the_router() -> None:
    ended, begun = asyncio.Event(), asyncio.Event()

    async def forever(request: SampleRequest) -> SampleResponse:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    client = Client(forever)

    async def give_up() -> None:
        request = client.client.prepare(SampleRequest(inputs=[{"input_ids": [65]}], timeout_s=20.0))
        call = asyncio.ensure_future(client.client.run(request))
        await begun.wait()
        call.cancel()
        await asyncio.wait_for(ended.wait(), 60)

    client.client.loop.call(give_up())


@pytest.mark.parametrize(
    ("value", "error"), [(threading.Lock(), "cannot pickle"), (Unreadable(), "cannot be read by the router")]
)
def test_call_that_cannot_be_sent_or_read_fails_alone(value: object, error: str) -> None:
    """Not those that share its message."""
    client = Client()

    async def calls() -> list[Any]:
        good = SampleRequest(inputs=[{"input_ids": [65]}], timeout_s=20.0)
        bad = replace(good, sampling_params={"stop": value})
        requests = map(client.client.prepare, (good, bad, good))
        return await asyncio.gather(*map(client.client.run, requests), return_exceptions=True)

    first, failed, last = client.client.loop.call(calls())
    assert isinstance(failed, RequestError) and error in str(failed)
    assert first.sequences[0].decoded == last.sequences[0].decoded == "A"
    assert client.handle.sessions == 1


def test_call_that_is_cancelled_in_the_router_has_an_answer() -> None:
    """Serve and futures raise CancelledError for errors of their own."""

    async def cancelled(request: SampleRequest) -> SampleResponse:
        raise asyncio.CancelledError

    client = Client(cancelled)
    with pytest.raises(ServiceError, match="was cancelled in the router"):
        client.sampled(65)


def added(client: Client, files: AdapterFiles) -> str:
    """The answer of a call that adds an adapter."""
    return client.client.loop.call(client.client.call(20.0, RouterAPI.add_adapter, "red", files))


@pytest.mark.parametrize(("size", "messages"), [(SMALL_BYTES, 1), (SMALL_BYTES + 1, 0)])
def test_small_adapter_travels_with_the_calls_and_a_large_one_by_handle(size: int, messages: int) -> None:
    """Ray's object store takes what would keep other calls waiting for the connection."""
    client = Client(lambda *arguments: "red@1")
    assert added(client, AdapterFiles(config=b"{}", weights=bytes(size))) == "red@1"
    assert client.handle.messages == messages


def test_error_of_an_added_adapter_is_the_routers_own() -> None:
    client = Client(AdapterError("not of this model"))
    with pytest.raises(AdapterError, match="not of this model"):
        added(client, AdapterFiles(config=b"{}", weights=b""))


def test_router_that_dies_while_an_adapter_is_added_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is not sent again: it may have been carried out, and the name would get another version."""
    monkeypatch.setattr(connection, "END_S", 0.2)
    client = Client(ActorDiedError())
    with pytest.raises(ServiceError, match="did not answer"):
        added(client, AdapterFiles(config=b"{}", weights=b""))
    assert client.handle.messages == 1


def test_connection_carries_no_other_control_call() -> None:
    """Its messages name a method, and the router runs the one meant for it alone."""
    client = Client()

    async def call() -> object:
        return await client.client._connection.control("shutdown")

    with pytest.raises(RequestError, match="'shutdown' is not called over this connection"):
        client.client.loop.call(call())
