"""`twinkle-serve doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinkle_serve.cli.exits import FAILED, CommandError
from twinkle_serve.cli.options import Command, local

if TYPE_CHECKING:
    from twinkle_serve.cli.checks import Check

DEFAULT_CONFIG = Path("serve_config.yaml")
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "bold red"), "note": ("·", "dim")}

Config = Annotated[
    Path | None, typer.Argument(help="A config to check. [default: serve_config.yaml, where there is one]")
]
Address = Annotated[str | None, typer.Option(help="host:port of the Ray cluster that it is for.")]
Engines = Annotated[bool, typer.Option("--engines", help="Also run the demo model on vLLM and on PyTorch: a minute.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: twinkle-serve doctor serve_config.yaml --engines")(doctor)


@local
def doctor(command: Command, config: Config = None, address: Address = None, engines: Engines = False) -> None:
    """Checks this machine and a config.

    Versions, devices, memory, ports, Ray, and whether the config is valid and fits. Starts nothing, except with
    --engines, and joins a Ray cluster only if --address or RAY_ADDRESS names one. Exits with 1 where a check failed.
    """
    from twinkle_serve.cli import checks, config_checks, ray_checks

    if config is not None and not config.is_file():
        raise CommandError(f"there is no file {config}. Name a config, or leave it out.")
    path = config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    found: list[Check] = []
    groups: list[tuple[str, Any]] = [
        ("versions", checks.versions),
        ("this machine", checks.machine),
        ("Ray", lambda: ray_checks.ray_checks(address)),
    ]
    groups.append(("config", lambda: config_checks.config_checks(path, address)))
    if engines:
        groups.append(("engines", checks.engines))
    for title, group in groups:
        with command.out.waiting(f"checking {title}"):
            found += group()
    failed = [each for each in found if each.result == "failed"]
    command.out.show({"passed": not failed, "checks": [asdict(each) for each in found]}, *_lines(found))
    if failed:
        raise typer.Exit(FAILED)


def _lines(found: list[Check]) -> list[Any]:
    """Returns a line for each check, and its remedy below."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for check in found:
        text = Text(check.text)
        if check.remedy:
            text.append(f"\n{check.remedy}", "yellow" if check.result != "failed" else "bold")
        made.add_row(Text(*MARKS[check.result]), check.name, text)
    bad = sum(check.result == "failed" for check in found)
    verdict = f"{bad} of {len(found)} checks failed" if bad else "no check failed"
    return [made, Text(verdict, "bold red" if bad else "green")]
