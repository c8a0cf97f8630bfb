"""Describes where a measurement was made."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """The short hash of the checkout's commit. Outside a git repository BENCHMARK_COMMIT, or "unknown"."""
    return _output("git", "rev-parse", "--short", "HEAD") or os.environ.get("BENCHMARK_COMMIT", "unknown")


def gpu_model() -> str:
    """Name of the first GPU, as nvidia-smi reports it; "" if there is none."""
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").partition("\n")[0]


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def machine(device: str = "cpu") -> str:
    """One line on the cores and the GPU in use."""
    return f"{os.cpu_count()} x {cpu_model()}, {gpu_model() if device == 'cuda' else 'no GPU'}"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
