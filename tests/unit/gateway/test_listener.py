"""The gateway's own listener: who may listen where, and how it ends."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from starlette.types import Receive, Scope, Send

from deployments import listener
from deployments.listener import Listener, bind, owner_at
from graphs.cluster import gateway_urls
from twinkle_serve.errors import ConfigError
from twinkle_serve.gateway.config import Address


def free_address() -> Address:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address(host="127.0.0.1", port=probe.getsockname()[1])


class App:
    """Answers a request once it may."""

    def __init__(self) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.set()
        await self.may_end.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"done"})


async def ask(address: Address) -> bytes:
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(("text", "host", "port"), [("127.0.0.1:80", "127.0.0.1", 80), ("[::1]:8000", "::1", 8000)])
def test_an_address_is_read_and_written_as_host_and_port(text: str, host: str, port: int) -> None:
    address = Address.model_validate(text)
    assert (address.host, address.port, str(address)) == (host, port, text)
    assert Address.model_validate(json.loads(address.model_dump_json())) == address


async def test_gateways_do_not_share_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections would go to one or the other, and no one would notice."""
    monkeypatch.setattr(listener, "BIND_S", 0.3)
    address = free_address()
    made = Listener(App(), bind(address, "one"), "one")
    with pytest.raises(ConfigError, match=f"listen={address}: another gateway listens there. Set it to a free port"):
        await asyncio.to_thread(bind, address, "two")
    await made.close()
    (await asyncio.to_thread(bind, address, "two")).close()


async def test_a_gateway_does_not_share_an_address_with_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve's proxy is one that would share it."""
    monkeypatch.setattr(listener, "BIND_S", 0.3)
    monkeypatch.setattr(listener, "PROBE_S", 0.3)
    address = free_address()
    with (
        socket.create_server((address.host, address.port), reuse_port=True),
        pytest.raises(ConfigError, match=f"listen={address}: another program listens there. Set it to a free port"),
    ):
        bind(address, "one")


async def test_replicas_of_one_gateway_share_an_address() -> None:
    address = free_address()
    first = Listener(App(), bind(address, "one"), "one")
    second = Listener(App(), await asyncio.to_thread(bind, address, "one"), "one")
    await first.close()
    assert await asyncio.to_thread(owner_at, address) == "one"
    await second.close()
    assert owner_at(address) is None


async def test_a_gateway_waits_for_the_one_that_leaves() -> None:
    address = free_address()
    before = Listener(App(), bind(address, "one"), "one")
    waiting = asyncio.create_task(asyncio.to_thread(bind, address, "two"))
    done, _ = await asyncio.wait([waiting], timeout=3 * listener.RETRY_S)
    assert not done
    await before.close()
    (await asyncio.wait_for(waiting, 5.0)).close()


def test_an_address_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "BIND_S", 0.0)
    monkeypatch.setattr(listener, "PROBE_S", 0.1)
    with pytest.raises(ConfigError, match=r"listen=192.0.2.1:8000: .* Set it to a free port"):
        bind(Address(host="192.0.2.1", port=8000), "one")


async def test_a_running_request_ends_before_its_listener_does() -> None:
    """`close` accepts no more connections, and waits for the requests that run."""
    app, address = App(), free_address()
    made = Listener(app, bind(address, "one"), "one")
    running = asyncio.create_task(ask(address))
    await app.begun.wait()
    closing = asyncio.create_task(made.close())
    (await asyncio.to_thread(bind, address, "two")).close()  # waits until nobody listens there
    assert not closing.done()
    app.may_end.set()
    assert (await running).endswith(b"done")
    await asyncio.wait_for(closing, 5.0)


async def test_a_request_that_never_ends_does_not_keep_the_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "DRAIN_S", 0.2)
    app, address = App(), free_address()
    made = Listener(app, bind(address, "one"), "one")
    running = asyncio.create_task(ask(address))
    await app.begun.wait()
    await asyncio.wait_for(made.close(), 5.0)
    assert b"done" not in await running


def test_urls_are_those_of_the_gateways_own_addresses() -> None:
    """Serve's proxy is named where a gateway has none."""
    from ray.serve.schema import ServeDeploySchema

    builder = "graphs.gateway:build"
    schema = ServeDeploySchema.model_validate(
        {
            "http_options": {"host": "0.0.0.0", "port": 8123, "root_path": "/root"},
            "applications": [
                {"name": "a", "import_path": builder, "route_prefix": "/a", "args": {"listen": "[::]:8001"}},
                {"name": "b", "import_path": builder, "route_prefix": "/b/", "args": {"listen": "[::1]:8002"}},
                {"name": "c", "import_path": builder, "route_prefix": "/c", "args": {}},
                {"name": "d", "import_path": builder, "route_prefix": None, "args": {}},
            ],
        }
    )
    assert gateway_urls(schema) == ["http://127.0.0.1:8001", "http://[::1]:8002", "http://127.0.0.1:8123/root/c"]
