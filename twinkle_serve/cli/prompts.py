"""Prompts and sampling parameters from a command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from twinkle_serve.cli.client import Sampling
from twinkle_serve.cli.exits import CommandError

INPUT_KEYS = ("messages", "input_ids", "text")

Texts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts, each a user's message.")]
File = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        help="Prompts from a file, one a line: text, or JSON with messages, input_ids or text. - is stdin.",
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Prompts are text as it is, without a chat template.")]
System = Annotated[str | None, typer.Option(help="A system message before each prompt.")]
Number = Annotated[int, typer.Option("-n", "--num-samples", min=1, help="Samples of each prompt.")]
MaxTokens = Annotated[int | None, typer.Option(min=0, help="Most tokens of a sample.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="0 samples greedily.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Share of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="Makes the samples reproducible.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends a sample. May be repeated.")]
Param = Annotated[
    list[str] | None, typer.Option("--param", "-p", metavar="NAME=JSON", help="Another sampling parameter. May repeat.")
]
Adapter = Annotated[str, typer.Option(help="Adapter, name or name@version.")]
Timeout = Annotated[float | None, typer.Option(min=0.001, help="Deadline in seconds. [default: the service's own]")]


def read_inputs(
    texts: Sequence[str] | None, file: Path | None, *, raw: bool = False, system: str | None = None
) -> list[dict[str, Any]]:
    """Returns inputs of a call from arguments and a file.

    Raises:
        CommandError: none, a file that cannot be read, or an invalid line.
    """
    inputs = [as_input(text, raw, system) for text in texts or ()]
    if file is not None:
        inputs += [_of_line(line, f"{file}, line {i}", raw, system) for i, line in _lines(file)]
    if not inputs:
        raise CommandError("no prompt. Give one as an argument, or several with --file.")
    return inputs


def as_input(text: str, raw: bool = False, system: str | None = None) -> dict[str, Any]:
    """Returns the input of a prompt: a conversation, or text as it is."""
    if raw:
        return {"text": text}
    before = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*before, {"role": "user", "content": text}]}


def _lines(file: Path) -> list[tuple[int, str]]:
    """Returns the lines of a file that are not empty, with their numbers."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"--file {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _of_line(line: str, where: str, raw: bool, system: str | None) -> dict[str, Any]:
    """Returns the input of a line."""
    if not line.lstrip().startswith(("{", '"')):
        return as_input(line, raw, system)
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CommandError(f"{where}: invalid JSON: {error}. Begin a line of text with another character.") from None
    if isinstance(value, str):
        return as_input(value, raw, system)
    if not any(key in value for key in INPUT_KEYS):
        keys = ", ".join(value) or "nothing"
        raise CommandError(f"{where}: an input has one of {', '.join(INPUT_KEYS)}, got {keys}.")
    return dict(value)


def read_sampling(
    num_samples: int = 1,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] | None = None,
    params: Sequence[str] | None = None,
    adapter: str = "",
    timeout_s: float | None = None,
) -> Sampling:
    """Returns how to sample, from options.

    Raises:
        CommandError: an invalid `--param`.
    """
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop or None}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for each in params or ():
        name, equals, text = each.partition("=")
        if not equals or not name:
            raise CommandError(f"--param must be NAME=JSON, such as top_k=20, got {each!r}.")
        if name in chosen:
            raise CommandError(f"--param {name} is given twice.")
        try:
            chosen[name] = json.loads(text)
        except ValueError:
            raise CommandError(f"--param {name}: {text!r} is not JSON. Text needs quotes: '{name}=\"…\"'.") from None
    return Sampling(params=chosen, num_samples=num_samples, adapter=adapter, timeout_s=timeout_s)


def shown(given: dict[str, Any]) -> str:
    """Returns an input for a person: its last message, its text, or the number of its tokens."""
    if given.get("messages"):
        return str(given["messages"][-1].get("content", ""))
    if "text" in given:
        return str(given["text"])
    return f"{len(given.get('input_ids', ()))} tokens"
