"""Memory of a service's processes, of files in memory, and of Ray's object store."""

from __future__ import annotations

import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import psutil
import ray
from ray._private.internal_api import memory_summary

from benchmarks.common.engines import SERVICE
from tests.support.processes import core_processes, with_title

MEMORY = Path("/dev/shm")
MIB = 2**20
DEPLOYMENTS = ("store", "router", "engine-dp0")

Processes: TypeAlias = list[tuple[str, psutil.Process]]
"""Processes with the parts of the system that they belong to."""


def service_processes() -> Processes:
    """The processes of the service's deployments, and vLLM's under its engine."""
    processes: Processes = []
    for deployment in DEPLOYMENTS:
        for replica in with_title(f"ServeReplica:{SERVICE}:{deployment}"):
            processes.append((deployment, replica))
            for core in core_processes(replica):
                processes += [("vllm", process) for process in (core, *core.children(recursive=True))]
    return processes


def memory_mib(service: Processes) -> dict[str, float]:
    """Memory of the service's processes without shared pages, of files in memory, and of Ray's object store."""
    used: dict[str, float] = defaultdict(float)
    for part, process in service:
        used[part] += process.memory_full_info().uss / MIB
    files = sum(path.stat().st_size for path in MEMORY.glob("twinkle-serve-*/**/*") if path.is_file())
    address = ray.get_runtime_context().gcs_address  # there may be other clusters
    summary = memory_summary(address, stats_only=True).splitlines()
    objects = next(line for line in summary if "Plasma memory usage" in line)
    used |= {"files": files / MIB, "object store": float(objects.split()[3])}
    return {part: round(mib, 1) for part, mib in used.items()}


def checkpoints(versions: int) -> Iterable[int]:
    """The versions after which memory is measured."""
    return {max(1, versions // 10), max(1, versions // 2), versions}


class PeakMemory(threading.Thread):
    """Peak memory of each part of the service and of this process, and of files in memory, which processes share and
    which count once, beyond those at the beginning."""

    def __init__(self, service: Processes) -> None:
        super().__init__(daemon=True)
        self._watched = [*service, ("caller", psutil.Process())]
        self._at_first = self._now()
        self._mib: dict[str, float] = defaultdict(float)
        self._end = threading.Event()

    def _now(self) -> dict[str, float]:
        used: dict[str, float] = defaultdict(float)
        for part, process in self._watched:
            used[part] += _own_mib(process)
        used["files"] = shutil.disk_usage(MEMORY).used / MIB  # deleted ones too, while they are mapped
        return used

    def run(self) -> None:
        while not self._end.wait(0.02):
            for part, now in self._now().items():
                self._mib[part] = max(self._mib[part], now - self._at_first[part])

    def stop(self) -> dict[str, float]:
        """MiB by part."""
        self._end.set()
        self.join()
        return {part: round(mib, 1) for part, mib in self._mib.items()}


def _own_mib(process: psutil.Process) -> float:
    """Memory of a process without files, in memory or not."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def memcpy_gb_s(size_bytes: int) -> float:
    """Copy rate of one thread, memory to memory, best of five."""
    source, target = np.ones(size_bytes, np.uint8), np.zeros(size_bytes, np.uint8)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return size_bytes / min(times) / 1e9
