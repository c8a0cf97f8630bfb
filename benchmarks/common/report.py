"""Figures of a run, as JSON."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.common.machine import commit, machine

Figures: TypeAlias = dict[str, Any]
"""Numbers, texts, and lists and dicts of them, as JSON has them."""

NOT_RECORDED = frozenset({"json", "plot"})
"""Options that change no figure."""


class Report:
    """Figures that are written to a JSON file whenever they change, so that a run that is cut short keeps its own.

    The key `unfinished` is true until `finish`.
    """

    def __init__(self, command: str, path: Path | None = None, device: str = "cpu") -> None:
        self._path = path
        self.figures: Figures = {
            "command": command,
            "commit": commit(),
            "machine": machine(device),
            "unfinished": True,
        }

    def update(self, **figures: object) -> None:
        self.figures |= figures
        self._write()

    def finish(self) -> None:
        """Prints all figures."""
        del self.figures["unfinished"]
        self._write()
        print(json.dumps(self.figures, indent=2))

    def _write(self) -> None:
        if self._path is not None:
            self._path.write_text(json.dumps(self.figures, indent=2) + "\n")


def command(name: str, options: argparse.Namespace) -> str:
    """The command line of a benchmark, defaults included."""
    words = ["scripts/bench", name]
    for option, value in vars(options).items():
        if option in NOT_RECORDED or value is None or value is False:
            continue
        words.append(f"--{option.replace('_', '-')}")
        if value is not True:
            words += [f"{each:g}" if isinstance(each, float) else str(each) for each in _as_list(value)]
    return shlex.join(words)


def _as_list(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else [value]


def quartiles(values: Sequence[float], digits: int = 3) -> Figures:
    """Median, and first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, digits), "quartiles": [round(low, digits), round(high, digits)]}
