"""Options that commands share, and the frame in which a command runs."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from twinkle_serve.cli.client import Client, Target, open_client
from twinkle_serve.cli.exits import FAILED, INTERRUPTED, CommandError, error_line, exit_code
from twinkle_serve.cli.output import Output
from twinkle_serve.errors import TwinkleServeError

P = ParamSpec("P")

URL_VARIABLE = "TWINKLE_SERVE_URL"
KEY_VARIABLE = "TWINKLE_SERVE_KEY"
DEBUG_VARIABLE = "TWINKLE_SERVE_DEBUG"
"""Environment variable: if set, a bug shows its traceback."""

AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TARGET: dict[str, Any] = {
    "url": Annotated[
        str | None, typer.Option(envvar=URL_VARIABLE, help="URL of a gateway. [default: http://127.0.0.1:8000]")
    ],
    "key": Annotated[str | None, typer.Option(envvar=KEY_VARIABLE, help="Key of the gateway, if it has any.")],
    "sampler": Annotated[str | None, typer.Option(help="Sampler of a gateway that has several.")],
    "service": Annotated[str | None, typer.Option(help="Application on a Ray cluster, to call it by handle.")],
    "address": Annotated[
        str | None, typer.Option(help="host:port of that Ray cluster, where it is not found by itself.")
    ],
}
"""Options of every command that talks to a service, with their types."""


@dataclass(frozen=True, slots=True)
class Command:
    """A running command."""

    out: Output
    target: Target
    """The service that it talks to."""

    def connect(self) -> Client:
        """Returns a client of the service; see `open_client`."""
        with self.out.waiting(f"connecting to {self.target}"):
            return open_client(self.target)


def talks(function: Callable[Concatenate[Command, P], None]) -> Callable[..., None]:
    """Makes a command of a function that talks to a service: adds the options of TARGET and `--json`."""
    return _framed(function, {**TARGET, "as_json": AsJSON})


def local(function: Callable[Concatenate[Command, P], None]) -> Callable[..., None]:
    """Makes a command of a function that talks to no service: adds `--json`."""
    return _framed(function, {"as_json": AsJSON})


def _framed(function: Callable[..., None], options: dict[str, Any]) -> Callable[..., None]:
    @functools.wraps(function)
    def command(**arguments: Any) -> None:
        out = Output(as_json=arguments.pop("as_json"))
        given = {name: arguments.pop(name) for name in options if name in TARGET}
        if given.get("service") is not None and given["url"] == os.environ.get(URL_VARIABLE):
            given["url"] = None  # the command line counts before the environment
        target = Target(**given)
        try:
            target.check()
            function(Command(out, target), **arguments)
        except TwinkleServeError as error:
            print(f"twinkle-serve: {error_line(error)}", file=sys.stderr)
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            print("twinkle-serve: interrupted.", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            remedy = f"Set {DEBUG_VARIABLE}=1 for the traceback."
            print(f"twinkle-serve: a bug: {error_line(error)}. {remedy}", file=sys.stderr)
            raise typer.Exit(FAILED) from None

    hints = typing.get_type_hints(function, include_extras=True)
    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [each.replace(annotation=hints[each.name], kind=each.KEYWORD_ONLY) for each in own]
    for name, hint in options.items():
        default = False if hint is AsJSON else None
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    del command.__wrapped__
    return command


def require(condition: bool, message: str) -> None:
    """Raises CommandError unless a command line makes sense."""
    if not condition:
        raise CommandError(message)
