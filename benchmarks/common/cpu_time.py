"""CPU time of a service and its caller, by part of the system."""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Round:
    """One timed piece of work."""

    seconds: float
    units: int
    """Amount of work, in the benchmark's unit: tokens or calls."""
    cpu_s: dict[str, float]
    """CPU seconds by part of the system."""

    @property
    def units_per_s(self) -> float:
        return self.units / self.seconds

    @property
    def outside_s(self) -> float:
        """CPU seconds spent outside the engine's core and worker."""
        return sum(seconds for part, seconds in self.cpu_s.items() if part != "engine core and worker")


async def measured(work: Awaitable[int]) -> Round:
    """Times work that returns its number of units."""
    before = _cpu_by_process()
    started = time.perf_counter()
    units = await work
    seconds = time.perf_counter() - started
    spent: dict[str, float] = defaultdict(float)
    for pid, (part, cpu_s) in _cpu_by_process().items():
        spent[part] += cpu_s - before.get(pid, (part, 0.0))[1]
    return Round(seconds, units, dict(spent))


def cpu_ms(rounds: Sequence[Round], units: int) -> dict[str, float]:
    """CPU of each part of the system, median of rounds, ms per unit."""
    parts = sorted({part for each in rounds for part in each.cpu_s})
    return {part: round(statistics.median(r.cpu_s.get(part, 0.0) for r in rounds) / units * 1e3, 3) for part in parts}


def pid_of(part: str) -> int:
    """Returns the id of the only process that is a part of the system."""
    (process,) = (each for each in psutil.Process().children(recursive=True) if _part_of(each) == part)
    return int(process.pid)


def _cpu_by_process() -> dict[int, tuple[str, float]]:
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[process.pid] = (_part_of(process), times.user + times.system)
        except psutil.NoSuchProcess:
            pass
    return found


def _part_of(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    # The process title is not always set, so look at the parents too.
    if "VLLM" in title or any(":engine-dp" in " ".join(parent.cmdline()) for parent in process.parents()):
        return "engine core and worker"
    if process.pid == os.getpid():
        return "caller"
    if "engine-dp" in title:
        return "engine replica"
    return "router replica" if ":router" in title else "rest of Ray"
