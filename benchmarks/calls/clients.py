"""Client processes that sample at the same time."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence

from benchmarks.calls.workloads import Work


class Clients:
    """Processes of `benchmarks.calls.client`, which wait for each other."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    @classmethod
    async def start(cls, target: Sequence[str], count: int, calls: int, at_a_time: int, seed: int) -> Clients:
        """Starts them; returns when all have sampled once.

        Args:
            target: kind, address and name, as the client takes them.
            calls: of each process in a round.
        """
        numbers = [str(calls), str(at_a_time)]
        processes = []
        for i in range(count):  # one after the other: they import for seconds
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "benchmarks.calls.client", *target, *numbers, str(seed + i),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            await _line(process)
            processes.append(process)
        return cls(processes)

    @property
    def ids(self) -> list[int]:
        return [process.pid for process in self._processes]

    async def work(self) -> Work:
        """Runs one round in all of them."""

        async def one(process: asyncio.subprocess.Process) -> Work:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            done = json.loads(await _line(process))
            await _line(process)
            return Work(done["tokens"], done["samples"])

        done = await asyncio.gather(*map(one, self._processes))
        return Work(sum(work.tokens for work in done), sum(work.samples for work in done))

    async def stop(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        if (text := line.decode().strip()) == "ready" or text.startswith("{"):
            return text
    raise RuntimeError(f"a client ended with {await process.wait()}")
