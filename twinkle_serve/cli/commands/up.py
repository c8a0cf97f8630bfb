"""`twinkle-serve up`."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

LAUNCHER = "graphs.run:main"
"""The launcher, as module:function. This package must not import graphs, so it is found by its name."""


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: twinkle-serve up serve_config.yaml")(up)


def up(
    config: Annotated[Path, typer.Argument(help="A Ray Serve config.")] = Path("serve_config.yaml"),
    replace: Annotated[bool, typer.Option("--replace", help="Replace applications of others on RAY_ADDRESS.")] = False,
    since: Annotated[float | None, typer.Option(hidden=True, help="When it was started, s since the epoch.")] = None,
) -> None:
    """Serves a config until Ctrl-C.

    Checks the config, starts Ray and Serve on this machine, or joins the cluster of RAY_ADDRESS, and says when every
    application is ready and how to call it. Exit codes: 0 after Ctrl-C, 1 when an application, Ray or Serve failed, 2
    when the config is wrong.
    """
    here = os.fspath(Path.cwd())
    if here not in sys.path:  # as with `python -m`: a config may name modules of the working directory
        sys.path.insert(0, here)
    module, _, function = LAUNCHER.partition(":")
    getattr(import_module(module), function)(config, replace, since)
