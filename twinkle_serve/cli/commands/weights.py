"""`twinkle-serve weights`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from twinkle_serve import timing
from twinkle_serve.cli.exits import CommandError
from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.tables import Column, seconds, size, table

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = (Column("version", lambda row: row[0]), Column("current", lambda row: row[1]))

group = typer.Typer(help="Replaces the model's own weights.", rich_markup_mode=None)

Directory = Annotated[Path, typer.Argument(help="Directory with the model's safetensors files, on this machine.")]
Kept = Annotated[str, typer.Argument(help="Label of the weights, as `weights list` shows it.")]
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
    command.out.show(data, f"{done} is current on {_engines_of(track)}: {size(total)} in {seconds(took_s)}")


@group.command("list", epilog="Example: twinkle-serve weights list")
@talks
def list_weights(command: Command) -> None:
    """Lists the versions that the service has kept, and those that are current."""
    found = command.connect().status()
    rows = []
    for label in found["weights_versions"]:
        tracks = [track for track, current in found["tracks"].items() if current == label]
        rows.append((label, ("current" if len(found["tracks"]) == 1 else ", ".join(tracks)) if tracks else ""))
    data = {"versions": found["weights_versions"], "tracks": found["tracks"]}
    command.out.show(data, table(COLUMNS, rows, command.out.width))


@group.command(epilog="Example: twinkle-serve weights use step-99")
@talks
def use(
    command: Command, version: Kept, mode: Mode = "keep", track: Track = "", timeout: Limit = timing.CONTROL_TIMEOUT_S
) -> None:
    """Makes weights current again that the service has kept, on all engines of a track at once."""
    client = command.connect()
    with command.out.waiting(f"loading {version}"):
        done = client.use_weights(version, mode, track, timeout)
    command.out.show({"weights": done}, f"{done} is current on {_engines_of(track)}")


def _engines_of(track: str) -> str:
    return f"all engines of track {track}" if track else "all engines"


def _files(directory: Path) -> Sequence[Path]:
    """Returns the safetensors files of a directory. Raises CommandError if there are none."""
    files = sorted(directory.expanduser().glob("*.safetensors")) if directory.expanduser().is_dir() else []
    if not files:
        raise CommandError(
            f"{directory} is not a directory with safetensors files on this machine. Save the model there with "
            "save_pretrained."
        )
    return files
