"""`twinkle-serve adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.tables import styled, table

group = typer.Typer(help="Adds, lists and removes LoRA adapters.", rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
Directory = Annotated[Path, typer.Argument(help="Directory on this machine, as peft's save_pretrained writes it.")]


@group.command(epilog="Example: twinkle-serve adapters add my_lora runs/step-100")
@talks
def add(command: Command, name: Name, directory: Directory) -> None:
    """Adds an adapter, or a new version of one, to every engine."""
    client = command.connect()
    with command.out.waiting(f"adding {name}"):
        version = client.add_adapter(name, directory)
    command.out.show({"adapter": version}, version)


@group.command("list", epilog="Example: twinkle-serve adapters list --json")
@talks
def list_adapters(command: Command) -> None:
    """Lists adapters and the versions that calls can name."""
    from twinkle_serve.cli.commands.status import ADAPTER_COLUMNS

    found = command.connect().status()
    rows = [(name, newest, found["adapter_versions"].get(name, [])) for name, newest in found["adapters"].items()]
    data = {name: {"newest": newest, "versions": versions} for name, newest, versions in rows}
    shown = table(ADAPTER_COLUMNS, rows, command.out.width) if rows else styled("no adapters", "dim")
    command.out.show({"adapters": data}, shown)


@group.command(epilog="Example: twinkle-serve adapters rm my_lora")
@talks
def rm(command: Command, name: Name) -> None:
    """Removes an adapter. Calls that run with it finish on it."""
    command.connect().remove_adapter(name)
    command.out.show({"removed": name}, f"removed {name}")
