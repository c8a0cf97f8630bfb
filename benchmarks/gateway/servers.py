"""The servers that are compared, on one machine."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from ray import serve
from ray.serve.context import _get_global_client

from benchmarks.common.engines import SERVICE, EngineArgs
from benchmarks.common.vllm_server import process_tree, vllm_server
from benchmarks.gateway import floor
from benchmarks.gateway.http import HTTPClient
from benchmarks.gateway.workloads import Endpoint
from graphs.gateway import build as build_gateway
from tests.support.deploy import deploy
from twinkle_serve import hub
from twinkle_serve.gateway.config import GatewayArgs
from twinkle_serve.sampler import RunningSampler

ENGINE_ARGS: EngineArgs = {
    "max_model_len": 4096,
    "dtype": "float32",
    "max_num_seqs": 256,
    "kv_cache_memory_bytes": 2**29,
}
READY_S = 60.0

Processes = Callable[[], Sequence[psutil.Process]]


@dataclass(frozen=True, slots=True)
class Server:
    """A server, its client, and the processes that work for it, this one left out."""

    url: str
    endpoint: Endpoint
    processes: Processes


class Servers:
    """Starts servers, next to each other; all end with the stack."""

    def __init__(self, stack: AsyncExitStack, directory: Path) -> None:
        self._stack, self._directory = stack, directory
        self._vllm: int | None = None
        self.sampler: RunningSampler | None = None
        """The service behind the gateways, called by handle."""

    async def start(self, names: Collection[str]) -> dict[str, Server]:
        """Starts servers by name, see `benchmarks.gateway`. Serve has to run, with HTTP."""
        servers = {}
        if "vllm" in names:
            server = vllm_server(str(hub.DEMO), ENGINE_ARGS, {}, free_port(), self._directory / "vllm-serve.log")
            url, self._vllm = await self._stack.enter_async_context(server)
            servers["vllm"] = await self._server(url, str(hub.DEMO), lambda: process_tree(self._vllm or 0))
        gateways = [name for name in ("gateway", "two", "proxy") if name in names]
        if gateways:
            mesh = {"dp_size": 1, "device_type": "cpu"}
            self.sampler = await asyncio.to_thread(
                deploy, SERVICE, model_id=str(hub.DEMO), device_mesh=mesh, engine_args=ENGINE_ARGS
            )
        proxy_url = f"http://127.0.0.1:{_serve_port()}"
        for name in gateways:
            url = f"http://127.0.0.1:{free_port()}"
            args: dict[str, Any] = {"num_replicas": 2 if name == "two" else 1, "samplers": {SERVICE: SERVICE}}
            if name == "proxy":
                url = f"{proxy_url}/gateway"
            else:
                args["listen"] = url.removeprefix("http://")
            application = build_gateway(GatewayArgs.model_validate(args))
            prefix = "/gateway" if name == "proxy" else None
            await asyncio.to_thread(serve.run, application, name=f"gateway-{name}", route_prefix=prefix)
            servers[name] = await self._server(url, SERVICE, self._ours)
            await _until_ready(f"{url}/readyz")
        if "floor" in names:
            await asyncio.to_thread(serve.run, floor.build(), name="floor", route_prefix="/floor")
            servers["floor"] = await self._server(f"{proxy_url}/floor", "", self._ours)
        return servers

    async def _server(self, url: str, model: str, processes: Processes) -> Server:
        http = await self._stack.enter_async_context(HTTPClient(url))
        return Server(url, Endpoint(http, model), processes)

    def _ours(self) -> list[psutil.Process]:
        """Ray's processes, and so all of the service's."""
        others = {} if self._vllm is None else {process.pid for process in process_tree(self._vllm)}
        return [each for each in psutil.Process().children(recursive=True) if each.pid not in others]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve_port() -> int:
    client: Any = _get_global_client()
    return int(client.http_config.port)


async def _until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)  # a server that starts has no event to wait for
    raise TimeoutError(f"{url} did not answer with 200 within {READY_S:g} s.")


def cpu_seconds(processes: Sequence[psutil.Process]) -> dict[int, float]:
    """Returns the CPU time that each process has had so far."""
    spent = {}
    for process in processes:
        try:
            times = process.cpu_times()
            spent[process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            pass
    return spent


def own_cpu_seconds() -> float:
    """Returns the CPU time that this process has had so far."""
    times = os.times()
    return times.user + times.system
