"""What commands print: results on stdout, progress on stderr, and that only on a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REFRESH_PER_S = 8
PIPE_WIDTH = 120
"""Width of tables that are not printed on a terminal."""


class Output:
    """Prints the results of one command."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads the results as they are printed."""
        return not self.as_json and sys.stdout.isatty()

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self.console().width

    def console(self) -> Console:
        """Returns a console of rich over stdout."""
        from rich.console import Console

        return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)

    def show(self, data: object, *renderables: RenderableType) -> None:
        """Prints a result: its data as JSON, or else the tables and lines for a person."""
        if self.as_json:
            print(as_json(data), flush=True)
            return
        console = self.console()
        for renderable in renderables:
            console.print(renderable)

    def line(self, data: object) -> None:
        """Prints a result of several as one line of JSON."""
        print(json.dumps(data, ensure_ascii=False, default=_plain), flush=True)

    def live(self, frame: Callable[[], RenderableType], interval_s: float) -> None:
        """Draws a frame again and again on the whole terminal, until Ctrl-C."""
        from rich.live import Live

        with Live(frame(), console=self.console(), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval_s)
                live.update(frame(), refresh=True)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Shows a spinner with a text, and how long it has taken, while the block runs."""
        with self.progress(text, None):
            yield

    @contextlib.contextmanager
    def progress(self, text: str, total: float | None, *, unit: str = "") -> Iterator[Callable[[float, str], None]]:
        """Shows a progress bar while the block runs. Yields a function that advances it, with a note behind it.

        Args:
            total: where it ends; None: unknown.
            unit: of the total; "bytes" are shown as such.
        """
        if not sys.stderr.isatty():
            yield lambda amount, note: None
            return
        from rich.progress import Progress

        with Progress(*_columns(total, unit), console=_stderr(), transient=True) as bar:
            task = bar.add_task(text, total=total, note="")

            def advance(amount: float, note: str) -> None:
                bar.update(task, advance=amount, note=note)

            yield advance


def as_json(data: object) -> str:
    """Returns JSON for people and programs, with the values of arrays and dataclasses."""
    return json.dumps(data, ensure_ascii=False, indent=2, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON")


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, emoji=False)


def _columns(total: float | None, unit: str) -> list[Any]:
    """Returns the parts of a progress bar."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}")
    note = TextColumn("[dim]{task.fields[note]}")
    if total is None:
        return [SpinnerColumn(), text, TimeElapsedColumn(), note]
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    return [text, BarColumn(bar_width=None), count, TimeRemainingColumn(compact=True, elapsed_when_finished=True), note]
