"""`twinkle-serve sessions`."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from twinkle_serve.cli.exits import CommandError
from twinkle_serve.cli.options import Command, require, talks
from twinkle_serve.cli.tables import Column, clipped, date, plural, printable, seconds, size, styled, table

if TYPE_CHECKING:
    from rich.tree import Tree

group = typer.Typer(help="Lists, shows and exports sessions.", rich_markup_mode=None)

Id = Annotated[str, typer.Argument(metavar="SESSION", help="Id of the session.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="SESSION", help="Ids of sessions.")]
Every = Annotated[bool, typer.Option("--all", help="All sessions.")]
Form = Annotated[
    Literal["features", "tree"], typer.Option("--format", help="Training inputs, one a path; or the tree of turns.")
]
Once = Annotated[bool, typer.Option("--shared-tokens-once", help="Label sampled tokens in the first path only.")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="File to write. [default: stdout]")]


@group.command("list", epilog="Example: twinkle-serve sessions list")
@talks
def list_sessions(command: Command) -> None:
    """Lists sessions, the least recently used one first. A gateway with keys wants one of scope admin."""
    found = command.connect().sessions()
    shown = table(COLUMNS, found, command.out.width) if found else styled("no sessions", "dim")
    command.out.show({"sessions": found}, shown)


@group.command(epilog="Example: twinkle-serve sessions show task-17")
@talks
def show(command: Command, session: Id) -> None:
    """Shows the turns of a session as a tree; several branches where a client went back."""
    found = command.connect().trajectory(session)
    command.out.show(found, tree(found, command.out.width))


@group.command(epilog="Example: twinkle-serve sessions export --all --out sessions.jsonl")
@talks
def export(
    command: Command,
    sessions: Ids = None,
    every: Every = False,
    form: Form = "features",
    shared_tokens_once: Once = False,
    out: OutFile = None,
) -> None:
    """Writes sessions as JSON lines, exact tokens, labels, logprobs and versions of the weights included.

    With --json, prints how much was written; that needs --out.
    """
    require(every != bool(sessions), "Give ids of sessions, or --all for every one.")
    require(form == "features" or not shared_tokens_once, "--shared-tokens-once needs --format features.")
    require(out is not None or not command.out.as_json, "--json needs --out: the sessions themselves go to stdout.")
    client = command.connect()
    ids = [each["id"] for each in client.sessions()] if every else list(sessions or ())
    lines: list[str] = []
    with command.out.progress("reading", len(ids)) as advance:
        for each in ids:
            found: list[Any] = (
                [client.trajectory(each)]
                if form == "tree"
                else client.features(each, shared_tokens_once=shared_tokens_once)
            )
            lines += [json.dumps(item, ensure_ascii=False, default=_plain) for item in found]
            advance(1, "")
    _write(lines, out)
    if out is not None:
        command.out.show(
            {"sessions": len(ids), "lines": len(lines), "file": str(out)},
            f"{len(ids)} sessions, {len(lines)} lines in {out}",
        )


def _write(lines: Sequence[str], out: Path | None) -> None:
    text = "".join(f"{line}\n" for line in lines)
    if out is None:
        sys.stdout.write(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--out {out} cannot be written: {error.strerror}. Name another file.") from None


def _plain(value: Any) -> Any:
    return value.tolist()


def tree(found: dict[str, Any], width: int) -> Tree:
    """Returns a session as a tree for a terminal of that width."""
    from rich.tree import Tree

    head = f"{found['session']}  {plural(len(found['nodes']), 'turn')}  since {date(found['created'])}"
    made = Tree(styled(head, "bold"))
    branches: dict[int | None, Tree] = {None: made}
    depths: dict[int | None, int] = {None: 0}
    for node in found["nodes"]:
        depth = depths[node["id"]] = depths[node["parent"]] + 1
        branches[node["id"]] = branches[node["parent"]].add(_node(node, max(20, width - 4 * depth)))
    return made


def _node(node: dict[str, Any], width: int) -> Any:
    """Returns a node: its messages, and a line about its tokens."""
    from rich.text import Text

    text = Text()
    for message in _spoken(node):
        text.append(clipped(f"{message['role']}: {message['content']}", width) + "\n")
    start, end = node["sampled"]
    about = [f"#{node['id']}", plural(end - start, "token"), node["stop_reason"], node["engine"]]
    if node["logprobs"]:
        about.insert(2, f"logprob {sum(node['logprobs']):.3f}")
    about += dict.fromkeys(span["weights"] for span in node["weight_versions"])
    about += [node["adapter"]] if node["adapter"] else []
    about += [f"branch: {node['branch']}"] if node["branch"] else []
    return text.append(textwrap.fill(printable("  ".join(about)), width), "dim")


def _spoken(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages of a node; of a raw turn, its texts as such."""
    if "messages" in node:
        return [{"role": each["role"], "content": each.get("content") or ""} for each in node["messages"]]
    prompt, sampled = node["text"]
    return [{"role": "prompt", "content": prompt or ""}, {"role": "sample", "content": sampled or ""}]


COLUMNS = (
    Column("session", lambda row: clipped(row["id"], 40)),
    Column("sampler", lambda row: row.get("sampler", "–"), 3),
    Column("created", lambda row: date(row["created"]), 2),
    Column("expires in", lambda row: seconds(max(0.0, row["expires"] - time.time())), 1, right=True),
    Column("size", lambda row: size(row["size_bytes"]), right=True),
)
