"""`twinkle-serve chat`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from twinkle_serve.cli import prompts
from twinkle_serve.cli.client import Conversation
from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.tables import printable
from twinkle_serve.cli.word_wrap import WordWrap
from twinkle_serve.errors import RequestError

PROMPT = "> "
LEAVE = ("/exit", "/quit")

Session = Annotated[str | None, typer.Option(help="Id of the session; a new one unless given. Needs a gateway.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: twinkle-serve chat --temperature 0 --session demo")(chat)


@talks
def chat(
    command: Command,
    session: Session = None,
    system: prompts.System = None,
    max_tokens: prompts.MaxTokens = None,
    temperature: prompts.Temperature = None,
    top_p: prompts.TopP = None,
    seed: prompts.Seed = None,
    stop: prompts.Stop = None,
    param: prompts.Param = None,
    adapter: prompts.Adapter = "",
    timeout: prompts.Timeout = None,
) -> None:
    """Talks with the model.

    A message a line, and each reply as it is sampled. Each turn continues the exact tokens of the one before. A
    gateway keeps them in a session, whose trajectory `sessions show` prints; by handle they are kept here, until the
    end. /exit or Ctrl-D ends; Ctrl-C stops a reply, or ends while it waits for a message. With --json each turn is a
    line of JSON.
    """
    sampling = prompts.read_sampling(1, max_tokens, temperature, top_p, seed, stop, param, adapter, timeout_s=timeout)
    client = command.connect()
    conversation = client.conversation(sampling, session, system)
    if command.out.is_terminal and sys.stdin.isatty():
        kept = f"session {conversation.session}, " if conversation.session else ""
        print(f"{kept}/exit or Ctrl-D ends", file=sys.stderr)
    for text in _messages(asks=command.out.is_terminal and sys.stdin.isatty()):
        try:
            _turn(command, conversation, text)
        except RequestError as error:
            if not sys.stdin.isatty():
                raise
            print(f"{type(error).__name__}: {error}", file=sys.stderr)  # the conversation goes on without this message


def _messages(*, asks: bool) -> Iterator[str]:
    """Yields messages: lines of the terminal, or of a file at stdin."""
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history
    while True:
        try:
            text = input(PROMPT) if asks else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            if asks:
                print()
            return
        if text.strip() in LEAVE:
            return
        if text.strip():
            yield text


def _turn(command: Command, conversation: Conversation, text: str) -> None:
    """Sends a message and prints the reply."""
    reply = ""
    wrap = WordWrap(command.out.width) if command.out.is_terminal else None
    with contextlib.closing(conversation.send(text)) as parts:  # type: ignore[type-var]  # generators have close
        try:
            for part in parts:
                reply += part
                if not command.out.as_json:
                    shown = printable(part)
                    print(wrap.feed(shown) if wrap else shown, end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(" (stopped, and left out of the conversation)", end="", file=sys.stderr)
    if command.out.as_json:
        command.out.line({"session": conversation.session, "message": text, "reply": reply})
    else:
        print(wrap.end() if wrap else "", flush=True)
