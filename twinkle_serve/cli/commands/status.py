"""`twinkle-serve status`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinkle_serve.cli.exits import UNREACHABLE, error_line
from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.tables import Column, clock, number, percent, plural, state, styled, table
from twinkle_serve.errors import ServiceError, ServiceNotReadyError

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.text import Text

    from twinkle_serve.data_format.status import SamplerStatus

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Draw it again and again, until Ctrl-C.")]
Interval = Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: twinkle-serve status --watch")(status)


@talks
def status(command: Command, watch: Watch = False, interval: Interval = 1.0) -> None:
    """Shows engines, queue and adapters.

    Exits with 3 where no engine is ready with the current weights.
    """
    client = command.connect()
    if not watch:
        found = client.status()
        command.out.show(found, report(found, command.out.width))
        if not is_ready(found):
            raise typer.Exit(UNREACHABLE)
        return
    if command.out.is_terminal:
        command.out.live(lambda: frame(command, client), interval)
    while True:
        found = client.status()
        if command.out.as_json:
            command.out.line(found)
        else:
            command.out.show(found, report(found, command.out.width), "")
        time.sleep(interval)


def frame(command: Command, client: Any) -> RenderableType:
    """Returns the state now; where the service does not answer, that."""
    from rich.console import Group

    head = styled(f"{clock(time.time())}  {command.target}  (Ctrl-C ends)", "dim")
    try:
        return Group(head, "", report(client.status(), command.out.width))
    except (ServiceError, ServiceNotReadyError) as error:
        return Group(head, "", styled(error_line(error), "bold red"))


def is_ready(found: SamplerStatus) -> bool:
    """Whether an engine is ready with the current weights of its track, and the service is awake."""
    engines = found["engines"].values()
    return not found["asleep"] and any(
        engine["state"] == "ready" and engine.get("weights") == found["tracks"][engine["track"]] for engine in engines
    )


def report(found: SamplerStatus, width: int) -> Group:
    """Returns the state of a service for a terminal of that width."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [_summary(found), Text()]
    rows = list(found["engines"].items())
    columns = ENGINE_COLUMNS if len(found["tracks"]) == 1 else (ENGINE_COLUMNS[0], TRACK_COLUMN, *ENGINE_COLUMNS[1:])
    parts.append(table(columns, rows, width) if rows else styled("no engines", "yellow"))
    failures = [(name, engine["last_failure"]) for name, engine in rows if engine.get("last_failure")]
    if failures:
        parts += [Text(), styled("Last failures", "bold"), *(Text(f"{name}  {text}") for name, text in failures)]
    if found["adapters"]:
        versions = found["adapter_versions"]
        parts += [
            Text(),
            table(ADAPTER_COLUMNS, [(n, v, versions.get(n, [])) for n, v in found["adapters"].items()], width),
        ]
    return Group(*parts)


def _summary(found: SamplerStatus) -> Text:
    from rich.text import Text

    engines = found["engines"].values()
    ready = sum(engine["state"] == "ready" for engine in engines)
    tracks = found["tracks"]
    weights = found["weights"] if len(tracks) == 1 else ", ".join(f"{track} {label}" for track, label in tracks.items())
    text = Text.assemble((found["model_id"], "bold"), f"  weights {weights}  ")
    text.append(f"{ready} of {len(engines)} engines ready", "green" if is_ready(found) else "bold red")
    for name in ("paused", "asleep"):
        if found[name]:
            text.append(f"  {name}", "bold yellow")
    rate = sum(engine.get("tokens_per_s", 0.0) for engine in engines)
    waiting = f"{plural(found['groups_waiting'], 'prompt')} waiting"
    return text.append(f"\n{number(rate)} tokens/s  {plural(found['requests'], 'call')}  {waiting}")


def _place(engine: Any) -> str:
    """Returns engine and device of an engine."""
    return f"{engine.get('engine', '–')}/{engine.get('device', '–')}"


ENGINE_COLUMNS = (
    Column("engine", lambda row: row[0]),
    Column("state", lambda row: state(row[1]["state"])),
    Column("running", lambda row: str(row[1]["sequences"]), right=True),
    Column("batch", lambda row: percent(row[1].get("batch_fill")), 2, right=True),
    Column("KV", lambda row: percent(row[1].get("kv_cache")), 3, right=True),
    Column("prefix hits", lambda row: percent(row[1].get("prefix_hits")), 5, right=True),
    Column("tokens/s", lambda row: number(row[1].get("tokens_per_s", 0.0)), 1, right=True),
    Column("preempted", lambda row: str(row[1].get("preemptions", "–")), 7, right=True),
    Column("weights", lambda row: row[1].get("weights", "–"), 4),
    Column("adapters", lambda row: ", ".join(row[1].get("adapters", ())) or "–", 8),
    Column("on", lambda row: _place(row[1]), 6),
)
TRACK_COLUMN = Column("track", lambda row: row[1]["track"], 1)
ADAPTER_COLUMNS = (
    Column("adapter", lambda row: row[0]),
    Column("newest", lambda row: row[1]),
    Column("versions", lambda row: ", ".join(row[2]), 1),
)
