"""`twinkle-serve engines`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.tables import seconds

group = typer.Typer(help="Drains, uses again and restarts engines.", rich_markup_mode=None)

Engine = Annotated[str, typer.Argument(help="Name of the engine, as `status` shows it.")]
Patience = Annotated[
    float,
    typer.Option("--timeout", min=0.1, max=3600, help="Seconds to finish its samples; the rest is sampled elsewhere."),
]


@group.command(epilog="Example: twinkle-serve engines drain engine-dp0 --timeout 120")
@talks
def drain(command: Command, engine: Engine, timeout: Patience = 60.0) -> None:
    """Gives an engine no more prompts, and waits until it has finished its own."""
    client, began = command.connect(), time.monotonic()
    with command.out.waiting(f"draining {engine}"):
        client.drain_engine(engine, timeout)
    _report(command, engine, "drained", began)


@group.command(epilog="Example: twinkle-serve engines undrain engine-dp0")
@talks
def undrain(command: Command, engine: Engine) -> None:
    """Uses a drained engine again."""
    client, began = command.connect(), time.monotonic()
    client.undrain_engine(engine)
    _report(command, engine, "in use again", began)


@group.command(epilog="Example: twinkle-serve engines restart engine-dp0")
@talks
def restart(command: Command, engine: Engine, timeout: Patience = 60.0) -> None:
    """Drains an engine, replaces its process, and waits until it is in use again."""
    client, began = command.connect(), time.monotonic()
    with command.out.waiting(f"restarting {engine}"):
        client.restart_engine(engine, timeout)
    _report(command, engine, "restarted", began)


def _report(command: Command, engine: str, done: str, began: float) -> None:
    took_s = time.monotonic() - began
    data = {"engine": engine, "done": done, "seconds": round(took_s, 3)}
    command.out.show(data, f"{engine} is {done} after {seconds(took_s)}")
