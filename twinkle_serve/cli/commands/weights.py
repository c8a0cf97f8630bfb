"""`twinkle-serve weights`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from twinkle_serve import timing
from twinkle_serve.cli.exits import CommandError
from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.tables import seconds, size

if TYPE_CHECKING:
    from collections.abc import Sequence

group = typer.Typer(help="Replaces the model's own weights.", rich_markup_mode=None)


@group.callback()
def weights() -> None:
    """Makes `push` a command of its own, although there is no other."""


Directory = Annotated[Path, typer.Argument(help="Directory with the model's safetensors files, on this machine.")]
Version = Annotated[str | None, typer.Option(help="Label of these weights. [default: name of the directory]")]
Mode = Annotated[
    Literal["keep", "wait", "abort"],
    typer.Option(help="Fate of running samples: they continue, end first, or end at once."),
]
Track = Annotated[str, typer.Option(help="Track of the engines that get them. [default: the service's first]")]
Limit = Annotated[float, typer.Option("--timeout", min=1, help="Limit of each step in seconds.")]


@group.command(epilog="Example: twinkle-serve weights push runs/step-100")
@talks
def push(
    command: Command,
    directory: Directory,
    version: Version = None,
    mode: Mode = "keep",
    track: Track = "",
    timeout: Limit = timing.CONTROL_TIMEOUT_S,
) -> None:
    """Sends every weight of the model to the service, and makes them current on all engines of a track at once."""
    files = _files(directory)
    label = version or directory.expanduser().resolve().name
    client = command.connect()
    began = time.monotonic()
    total = sum(path.stat().st_size for path in files)
    with command.out.progress(f"sending {label}", total, unit="bytes") as advance:
        done = client.push_weights(
            directory.expanduser(), label, mode, track, timeout, lambda count: advance(count, "")
        )
    took_s = time.monotonic() - began
    data = {"weights": done, "bytes": total, "seconds": round(took_s, 3)}
    where = f"all engines of track {track}" if track else "all engines"
    command.out.show(data, f"{done} is current on {where}: {size(total)} in {seconds(took_s)}")


def _files(directory: Path) -> Sequence[Path]:
    """Returns the safetensors files of a directory. Raises CommandError if there are none."""
    files = sorted(directory.expanduser().glob("*.safetensors")) if directory.expanduser().is_dir() else []
    if not files:
        raise CommandError(
            f"{directory} is not a directory with safetensors files on this machine. Save the model there with "
            "save_pretrained."
        )
    return files
