"""The gateway's ASGI application over a sampler in this process, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

from tests.support.local_sampler import make
from twinkle_serve.config import SessionArgs, TraceArgs, traces_of
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_request import Inputs, SampleRequest
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.errors import ServiceNotReadyError
from twinkle_serve.gateway.app import build_app
from twinkle_serve.gateway.config import GatewayArgs
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.keys import Caller, Keys
from twinkle_serve.gateway.samplers import Connect, Samplers
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.local import LocalClient
from twinkle_serve.sampler.router_client import BucketSender, RouterClient
from twinkle_serve.sessions import SessionsAPI, SessionStore
from twinkle_serve.sessions.client import LocalSessions

P = ParamSpec("P")
T = TypeVar("T")

URL = "http://gateway"


class OnAnyLoop(RouterClient):
    """A client in this process whose coroutines run on the caller's event loop, as those of a service do."""

    def __init__(self, client: LocalClient) -> None:
        self._client = client
        self.loop = client.loop
        self.requests: list[SampleRequest] = []
        """Requests that sample, as they came."""

    def snapshot(self, inputs: Inputs) -> Inputs:
        return self._client.snapshot(inputs)

    def prepare(self, request: SampleRequest) -> SampleRequest:
        return self._client.prepare(request)

    async def run(self, request: SampleRequest) -> SampleResponse:
        self.requests.append(request)
        return await self.loop.call_async(self._client.run(request))

    async def run_iter(self, request: SampleRequest) -> AsyncGenerator[SampleResponse, None]:
        self.requests.append(request)
        items = self.loop.iterate_async(self._client.run_iter(request))
        async with contextlib.aclosing(items) as responses:
            async for response in responses:
                yield response

    async def run_stream(self, request: SampleRequest) -> AsyncGenerator[tuple[str, StopReason | None], None]:
        self.requests.append(request)
        items = self.loop.iterate_async(self._client.run_stream(request))
        async with contextlib.aclosing(items) as deltas:
            async for delta in deltas:
                yield delta

    async def run_updates(self, request: SampleRequest) -> AsyncGenerator[UpdatesItem, None]:
        self.requests.append(request)
        items = self.loop.iterate_async(self._client.run_updates(request))
        async with contextlib.aclosing(items) as updates:
            async for update in updates:
                yield update

    def call(
        self,
        timeout_s: float,
        method: Callable[Concatenate[RouterAPI, P], Awaitable[T]],
        *args: P.args,
        **options: P.kwargs,
    ) -> Coroutine[Any, Any, T]:
        return self.loop.call_async(self._client.call(timeout_s, method, *args, **options))

    def cancel(self, request_id: str, inputs: list[int] | None) -> Coroutine[Any, Any, int]:
        return self.loop.call_async(self._client.cancel(request_id, inputs))

    def sending(self) -> contextlib.AbstractContextManager[BucketSender]:
        return self._client.sending()

    def shutdown(self, *, force: bool = False) -> None:
        self._client.shutdown(force=force)


class OneSampler(Connect):
    """Every application is the same sampler. Its sessions are in memory."""

    def __init__(self, client: OnAnyLoop, starting: Collection[str]) -> None:
        """
        Args:
            starting: applications that are not up yet.
        """
        self._client, self._starting = client, starting
        self._sessions = LocalSessions(SessionStore(SessionArgs(), None))

    def router(self, application: str) -> RouterClient:
        if application in self._starting:
            raise ServiceNotReadyError(f"the sampler {application!r} is starting, or is not deployed.")
        return self._client

    def sessions(self, application: str) -> SessionsAPI:
        return self._sessions


@dataclass(frozen=True)
class GatewayUnderTest:
    """A gateway, and the sampler behind it."""

    app: FastAPI
    context: GatewayContext
    sampler: RunningSampler
    """The same engine, called from Python."""
    client: OnAnyLoop
    """The gateway's way to it."""

    def http(self, **headers: str) -> httpx.AsyncClient:
        """A client of HTTP without sockets. Answers arrive whole, and the gateway never sees a client go."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url=URL, headers=headers, timeout=60.0)

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        """A real server on a free port of this machine: for clients that stream, go away or send bad HTTP. Yields its
        URL."""
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, name="gateway", daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the server did not end"

    def is_idle(self) -> bool:
        """Whether neither the router nor the engine has anything to do."""
        status = self.sampler.status()
        sequences = sum(engine["sequences"] for engine in status["engines"].values())
        return not (sequences or status["requests"] or status["groups_waiting"])


@contextlib.contextmanager
def gateway_app(
    *,
    engine_args: Mapping[str, Any] | None = None,
    keys: Mapping[str, Caller] | None = None,
    starting: tuple[str, ...] = (),
    sampler_traces: TraceArgs | None = None,
    **gateway_args: Any,
) -> Iterator[GatewayUnderTest]:
    """A gateway over a sampler on the fake engine, in this process.

    Args:
        engine_args: of the fake engine.
        keys: holders of keys, by key.
        starting: applications, of `samplers`, that are not up yet.
        sampler_traces: `traces` of the sampler.
        gateway_args: as of `GatewayArgs`; every application of `samplers` is the same sampler.
    """
    sampler, local = make(traces=sampler_traces, **(engine_args or {}))
    client = OnAnyLoop(local)

    args = GatewayArgs.model_validate(gateway_args)
    samplers = Samplers(args.samplers, OneSampler(client, starting))
    context = GatewayContext(args, Keys(keys or {}), samplers, traces=traces_of(args.traces, "gateway"))
    try:
        yield GatewayUnderTest(build_app(context), context, sampler, client)
    finally:
        if context.traces is not None:
            context.traces.close()
        sampler.shutdown()


async def ask(app: FastAPI, path: str, body: bytes = b"", *, gone_after: asyncio.Event | None = None) -> list[Any]:
    """Sends a POST of JSON straight to the application, and returns the messages that it sends.

    Args:
        gone_after: once it is set, the client is gone.
    """
    sent: list[Any] = []
    parts: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if parts:
            return parts.pop(0)
        await (gone_after or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return sent
