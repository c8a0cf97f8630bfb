"""`twinkle-serve` in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from twinkle_serve.cli import PROGRAM
from twinkle_serve.cli.app import app


def run(*arguments: str, stdin: str | None = None, **environment: str) -> Result:
    """Runs a command line. Returns its exit code and output; fails on a traceback."""
    clean = {"TWINKLE_SERVE_URL": None, "TWINKLE_SERVE_KEY": None, "NO_COLOR": "1", **environment}
    result = CliRunner().invoke(app, arguments, prog_name=PROGRAM, input=stdin, env=clean)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def succeeds(*arguments: str, stdin: str | None = None, **environment: str) -> str:
    """Runs a command line that must exit with 0. Returns its stdout."""
    result = run(*arguments, stdin=stdin, **environment)
    assert result.exit_code == 0, (arguments, result.exit_code, result.stdout, result.stderr)
    assert result.stderr == ""
    return result.stdout


def json_of(*arguments: str, stdin: str | None = None) -> Any:
    """Runs a command line with `--json` that exits with 0. Returns the parsed output."""
    return json.loads(succeeds(*arguments, "--json", stdin=stdin))


def fails(code: int, *arguments: str, **environment: str) -> str:
    """Runs a command line that exits with a code and writes nothing but one line on stderr. Returns that line."""
    result = run(*arguments, **environment)
    assert result.exit_code == code, (arguments, result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(PROGRAM)
    return str(line)
