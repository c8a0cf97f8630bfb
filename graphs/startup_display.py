"""Shows a start: one block that is drawn again and again on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from graphs.startup import Step

MAX_ENGINES = 8
"""Engines of an application with own lines; more share one."""

FRAMES_PER_S = 4
MARKS = {"ready": ("✓", "green"), "failed": ("✗", "red")}


class Display(Protocol):
    """Where the launcher writes. Used as a context while something starts."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, steps: Sequence[Step]) -> None:
        """Shows these steps from now on, as they change."""

    def changed(self, step: Step) -> None:
        """A step has begun, entered a stage or ended."""

    def say(self, text: str, style: str = "") -> None:
        """Writes text as it is, above a block."""


def display_for(stream: TextIO, environment: Mapping[str, str] = os.environ) -> Display:
    """A block on a terminal, unless NO_COLOR or CI is set; else plain lines."""
    plain = not stream.isatty() or environment.get("TERM") == "dumb"
    if plain or any(environment.get(name) for name in ("NO_COLOR", "CI")):
        return PlainDisplay(stream)
    return LiveDisplay(stream)


class PlainDisplay:
    """A line for each change, with the time of day."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, steps: Sequence[Step]) -> None:
        pass

    def changed(self, step: Step) -> None:
        now = step.ended if step.ended is not None else step.stage_began
        took = f" after {duration(step.seconds(now))}" if step.outcome != "running" else ""
        earlier = stages(step)
        self.say(f"{clock()}  {_title(step)}: {step.stage}{took}{f' ({earlier})' if earlier else ''}")

    def say(self, text: str, style: str = "") -> None:
        print(text, file=self._stream, flush=True)


class LiveDisplay:
    """One block with a line for each step, drawn again as time passes."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, force_terminal=True, highlight=False, soft_wrap=True)
        self._steps: Sequence[Step] = []
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    def __enter__(self) -> LiveDisplay:
        self._live = Live(
            get_renderable=self._block,
            console=self._console,
            refresh_per_second=FRAMES_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    def changed(self, step: Step) -> None:
        pass  # the next frame has it

    def say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _block(self) -> Table:
        return block(list(self._steps), time.monotonic(), self._spinner)


def block(steps: Sequence[Step], now: float, spinner: Spinner) -> Table:
    """A table of the steps; the engines of an application in one line where there are many."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, overflow="ellipsis", style="dim", ratio=1)  # what is left of the width
    engines = Counter(step.application for step in steps if _is_engine(step))
    folded: set[str] = set()
    for step in steps:
        if _is_engine(step) and engines[step.application] > MAX_ENGINES:
            if step.application not in folded:
                folded.add(step.application)
                _add_folded(
                    table, [s for s in steps if s.application == step.application and _is_engine(s)], now, spinner
                )
            continue
        mark: Text | Spinner = spinner
        if step.outcome in MARKS:
            mark = Text(*MARKS[step.outcome])
        table.add_row(mark, _title(step), step.stage, duration(step.seconds(now)), stages(step))
    return table


def _add_folded(table: Table, engines: Sequence[Step], now: float, spinner: Spinner) -> None:
    counts = Counter(step.stage for step in engines)
    ready = counts.pop("ready", 0)
    mark = Text(*MARKS["ready"]) if ready == len(engines) else spinner
    rest = " · ".join(f"{count} {stage}" for stage, count in counts.items())
    took = max(step.seconds(now) for step in engines)
    table.add_row(mark, f"{engines[0].application} engines", f"{ready} of {len(engines)} ready", duration(took), rest)


def _is_engine(step: Step) -> bool:
    return step.name.startswith("engine-dp")


def _title(step: Step) -> str:
    return f"{step.application} {step.name}".strip()


def stages(step: Step) -> str:
    """The stages that are over, with their times; of a step with one stage its own time says it."""
    if step.outcome != "running" and len(step.earlier) < 2:
        return ""
    return " · ".join(f"{stage} {duration(took_s)}" for stage, took_s in step.earlier)


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def clock() -> str:
    return time.strftime("%H:%M:%S")
