"""All commands of `twinkle-serve`, and usage errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from twinkle_serve.cli.commands import (
    adapters,
    bench,
    chat,
    doctor,
    engines,
    sampling,
    sessions,
    status,
    top,
    up,
    verify,
    weights,
)
from twinkle_serve.cli.exits import FAILED, INTERRUPTED, USAGE

HELP = """Runs and inspects Twinkle Serve.

A command that talks to a service finds it by --url, the URL of its gateway (http://127.0.0.1:8000 unless given), or by
--service, the name of its application on a Ray cluster. Exit codes: 0 done, 1 refused, failed or not passed, 2 wrong
usage, 3 not reachable or not ready, 130 Ctrl-C.
"""
EXAMPLE = "Example: twinkle-serve up serve_config.yaml, then in another terminal: twinkle-serve status"


class Commands(TyperGroup):
    """A group of commands whose errors are one line on stderr."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line; see click."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            code = complain(error)
        except typer.Abort:
            code = INTERRUPTED
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def complain(error: typer.TyperException) -> int:
    """Writes a usage error. Returns its exit code."""
    context: typer.Context | None = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "twinkle-serve"
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    if context is not None and type(error).__name__ == "NoArgsIsHelpError":
        print(text, file=sys.stderr)  # the help, since no command was given
        return USAGE
    print(f"{command}: {' '.join(text.split())} See {command} --help.", file=sys.stderr)
    return int(getattr(error, "exit_code", FAILED))


def print_version(wanted: bool) -> None:
    """Prints the version of this package and ends, if wanted."""
    if wanted:
        from importlib.metadata import version

        print(version("twinkle-serve"))
        raise typer.Exit


app = typer.Typer(cls=Commands, help=HELP, epilog=EXAMPLE, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Takes the options of `twinkle-serve` itself."""


for module in (up, status, top, sampling, chat, verify, bench, doctor):
    module.register(app)
for name, group in (
    ("adapters", adapters.group),
    ("weights", weights.group),
    ("engines", engines.group),
    ("sessions", sessions.group),
):
    app.add_typer(group, name=name)
