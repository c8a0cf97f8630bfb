"""The command line `twinkle-serve`. Commands import their libraries when they run, so that `--help` is quick."""

from __future__ import annotations

import sys

PROGRAM = "twinkle-serve"


def main() -> None:
    """Runs the command line of this process."""
    from twinkle_serve.errors import ConfigError
    from twinkle_serve.extras import require_extra

    try:
        require_extra(PROGRAM, "server", "typer")
    except ConfigError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2)
    from twinkle_serve.cli.app import app

    app(prog_name=PROGRAM)
