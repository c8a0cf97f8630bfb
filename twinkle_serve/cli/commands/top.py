"""`twinkle-serve top`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinkle_serve.cli.client import Client
from twinkle_serve.cli.exits import error_line
from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.tables import Column, clipped, clock, number, seconds, sparkline, styled, table
from twinkle_serve.errors import RequestError, ServiceError, ServiceNotReadyError

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.text import Text

    from twinkle_serve.data_format.telemetry import Event, HistoryPoint, TelemetryReport

Once = Annotated[bool, typer.Option("--once", help="Print it once, as it also is where stdout is no terminal.")]
Interval = Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")]
Minutes = Annotated[float, typer.Option(min=0.1, max=60, help="How far back the lines go.")]

SHOWN_EVENTS = 6
SHOWN_CALLS = 10


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: twinkle-serve top --minutes 10")(top)


@talks
def top(command: Command, once: Once = False, interval: Interval = 2.0, minutes: Minutes = 15.0) -> None:
    """Shows history, events and running calls.

    The service keeps an hour, a point each 5 s. The calls of a gateway with keys need one of scope admin.
    """
    client = command.connect()
    if command.out.is_terminal and not once:
        command.out.live(lambda: frame(command, client, minutes), interval)
    report, calls, problem = look(client, minutes)
    data = {**report, "calls": calls}
    command.out.show(data, screen(report, calls, problem, command.out.width))


def look(client: Client, minutes: float) -> tuple[TelemetryReport, list[Any] | None, str]:
    """Returns history and running calls; None with the reason where the key does not cover calls."""
    report = client.telemetry(time.time() - 60 * minutes)
    try:
        return report, list(client.calls()), ""
    except RequestError as error:
        return report, None, str(error)


def frame(command: Command, client: Client, minutes: float) -> RenderableType:
    """Returns the screen now; where the service does not answer, that."""
    from rich.console import Group

    head = styled(f"{clock(time.time())}  {command.target}  last {minutes:g} min  (Ctrl-C ends)", "dim")
    try:
        return Group(head, "", screen(*look(client, minutes), command.out.width))
    except (ServiceError, ServiceNotReadyError) as error:
        return Group(head, "", styled(error_line(error), "bold red"))


def screen(report: TelemetryReport, calls: list[Any] | None, problem: str, width: int) -> Group:
    """Returns lines of the history, events and calls for a terminal of that width."""
    from rich.console import Group
    from rich.text import Text

    points = report["points"]
    parts: list[Any] = (
        [history(points, width)] if points else [styled("no history yet: a point comes each 5 s", "yellow")]
    )
    if events := report["events"][-SHOWN_EVENTS:]:
        parts += [Text(), *(_event(event, width) for event in events)]
    parts.append(Text())
    if calls is None:
        parts.append(styled(clipped(f"calls: {problem}", max(width, 40)), "yellow"))
    elif not calls:
        parts.append(styled("no running calls", "dim"))
    else:
        parts.append(table(CALL_COLUMNS, calls[:SHOWN_CALLS], width))
        if len(calls) > SHOWN_CALLS:
            parts.append(styled(f"and {len(calls) - SHOWN_CALLS} more", "dim"))
    return Group(*parts)


def history(points: list[HistoryPoint], width: int) -> Any:
    """Returns a table with a line for each figure: its name, its newest value, and its course."""
    from rich.table import Table
    from rich.text import Text

    rows = [(name, show(points), values(points)) for name, show, values in FIGURES]
    label = max(len(name) for name, *_ in rows)
    value = max(len(text) for _, text, _ in rows)
    made = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "right", "left"):
        made.add_column(no_wrap=True, justify=justify)
    for name, text, course in rows:
        made.add_row(Text(name, "bold"), text, Text(sparkline(course, width - label - value - 6), "cyan"))
    return made


def _event(event: Event, width: int) -> Text:
    from rich.text import Text

    style = {"engine lost": "bold red", "poison": "red", "engine ready": "green"}.get(event["kind"], "")
    head = f"{clock(event['time'])}  "
    where = f" {event['engine']}" if event["engine"] else ""
    rest = clipped(f"{where}  {event['text']}", width - len(head) - len(event["kind"]) - 1)
    return Text.assemble(head, (event["kind"], style), " ", rest)


def _last(points: list[HistoryPoint], name: str) -> Any:
    return points[-1][name]  # type: ignore[literal-required]


def _course(points: list[HistoryPoint], name: str) -> list[Any]:
    return [point[name] for point in points]  # type: ignore[literal-required]


def _plain(name: str) -> tuple[Any, Any]:
    """Returns how a figure is shown, and its values."""
    return lambda points: number(_last(points, name)), lambda points: _course(points, name)


def _timed(name: str, at: int) -> tuple[Any, Any]:
    """Returns the same of a percentile: its newest value that is known."""

    def values(points: list[HistoryPoint]) -> list[float | None]:
        return [None if each is None else each[at] for each in _course(points, name)]

    def show(points: list[HistoryPoint]) -> str:
        return seconds(next((each for each in reversed(values(points)) if each is not None), None))

    return show, values


def _staleness(points: list[HistoryPoint]) -> str:
    known = [each for each in _course(points, "staleness") if each is not None]
    return f"{known[-1]:.2g}" if known else "–"


FIGURES: tuple[tuple[str, Any, Any], ...] = (
    ("tokens/s", *_plain("tokens_per_s")),
    ("prompt tokens/s", *_plain("prompt_tokens_per_s")),
    ("samples/s", *_plain("samples_per_s")),
    ("sequences", *_plain("sequences")),
    ("prompts waiting", *_plain("waiting")),
    ("calls", *_plain("running_calls")),
    ("failed calls", *_plain("failed_calls")),
    ("call, median", *_timed("call_s", 0)),
    ("call, 95%", *_timed("call_s", 1)),
    ("queued, 95%", *_timed("queued_s", 1)),
    ("staleness", _staleness, lambda points: _course(points, "staleness")),
    ("engines ready", *_plain("engines_ready")),
)
"""Name, text of the newest value, and values."""

CALL_COLUMNS = (
    Column("call", lambda call: call["id"][:12], 3),
    Column("caller", lambda call: (call["caller"] or "–")[:16], 2),
    Column("age", lambda call: seconds(call["age_s"]), right=True),
    Column("left", lambda call: seconds(call["left_s"]), 4, right=True),
    Column("prompts", lambda call: str(call["prompts"]), 5, right=True),
    Column("done", lambda call: f"{call['samples_done']}/{call['samples']}", right=True),
    Column("adapter", lambda call: call["adapter"] or "–", 1),
)
