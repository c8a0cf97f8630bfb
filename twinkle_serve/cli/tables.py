"""Tables and text for terminals, also narrow ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

STATE_STYLES = {
    "ready": "green",
    "starting": "yellow",
    "catching up": "yellow",
    "draining": "yellow",
    "drained": "cyan",
    "dead": "bold red",
}
BLOCKS = "▁▂▃▄▅▆▇█"
GAP = 2
"""Columns between two columns of a table."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    title: str
    cell: Callable[[Any], Text | str]
    """Text for a row."""
    rank: int = 0
    """Columns with the highest ranks are left out first where the table is too wide; 0 stays."""
    right: bool = False
    """Whether its text is aligned at the right, as numbers are."""


def table(columns: Sequence[Column], rows: Sequence[Any], width: int) -> Table:
    """Returns a table without borders, with as many of the columns as fit."""
    from rich.table import Table
    from rich.text import Text

    def text(value: Text | str) -> Text:
        return value if isinstance(value, Text) else Text(value)

    cells = {column.title: [text(column.cell(row)) for row in rows] for column in columns}
    widths = {title: max(len(title), *(each.cell_len for each in texts), 0) for title, texts in cells.items()}
    kept = list(columns)
    while sum(widths[column.title] + GAP for column in kept) - GAP > width and any(column.rank for column in kept):
        kept.remove(max(kept, key=lambda column: column.rank))
    made = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for column in kept:
        justify: Any = "right" if column.right else "left"
        made.add_column(column.title, no_wrap=True, overflow="ellipsis", justify=justify)
    for i in range(len(rows)):
        made.add_row(*(cells[column.title][i] for column in kept))
    return made


def fields(pairs: Iterable[tuple[str, object]]) -> Table:
    """Returns names and values, one pair a line."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, GAP, 0, 0))
    made.add_column(no_wrap=True, style="bold")
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    return made


def styled(text: str, style: str) -> Text:
    """Returns text in a style."""
    from rich.text import Text

    return Text(text, style=style)


def state(name: str) -> Text:
    """Returns the state of an engine in its colour."""
    return styled(name, STATE_STYLES.get(name, ""))


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Returns a line of blocks, the newest value at the right, each block the mean of values that follow each other.

    Its full height is the largest mean. A value that is None leaves a gap.
    """
    values = list(values)
    if not values or width < 1:
        return ""
    each = -(-len(values) // width)
    first = len(values) % each
    groups = [values[:first]] if first else []
    groups += [values[i : i + each] for i in range(first, len(values), each)]
    means = [_mean(group) for group in groups]
    top = max((mean for mean in means if mean is not None), default=0.0)
    return "".join(" " if mean is None else _block(mean, top) for mean in means)


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _block(value: float, top: float) -> str:
    return BLOCKS[0] if top <= 0 else BLOCKS[min(len(BLOCKS) - 1, round(value / top * (len(BLOCKS) - 1)))]


def plural(number: int, noun: str) -> str:
    """Returns a number and a noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def percent(share: float | None) -> str:
    """Returns a share as a percentage; a dash for None."""
    return "–" if share is None else f"{100 * share:.0f}%"


def seconds(value: float | None) -> str:
    """Returns a duration with three digits at most; a dash for None."""
    if value is None:
        return "–"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 100:
        return f"{value:.1f} s"
    minutes = value / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"


def size(count: float) -> str:
    """Returns a number of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def number(value: float) -> str:
    """Returns a number with separators of thousands, and a decimal where it is small."""
    return f"{value:,.1f}" if 0 < abs(value) < 10 and value != int(value) else f"{value:,.0f}"


def clock(at: float) -> str:
    """Returns the local time of day of seconds since 1970."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def date(at: float) -> str:
    """Returns the local date and time of seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def printable(text: str) -> str:
    """Returns text without characters that control a terminal: a sample may have any."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def clipped(text: str, width: int) -> str:
    """Returns text in one line of at most `width` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= width else f"{line[: max(1, width - 1)]}…"
