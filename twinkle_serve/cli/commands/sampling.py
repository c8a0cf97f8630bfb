"""`twinkle-serve sample` and `twinkle-serve score`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinkle_serve.cli import prompts
from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.tables import Column, clipped, printable, styled, table

if TYPE_CHECKING:
    from rich.console import RenderableType

Top = Annotated[int, typer.Option("--top-logprobs", min=0, help="Likeliest tokens to show at each position.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: twinkle-serve sample '12+34=' -n 4 --max-tokens 8 --seed 7")(sample)
    app.command(epilog="Example: twinkle-serve score --raw '12+34=46'")(score)


@talks
def sample(
    command: Command,
    texts: prompts.Texts = None,
    file: prompts.File = None,
    raw: prompts.Raw = False,
    system: prompts.System = None,
    num_samples: prompts.Number = 1,
    max_tokens: prompts.MaxTokens = None,
    temperature: prompts.Temperature = None,
    top_p: prompts.TopP = None,
    seed: prompts.Seed = None,
    stop: prompts.Stop = None,
    param: prompts.Param = None,
    adapter: prompts.Adapter = "",
    timeout: prompts.Timeout = None,
) -> None:
    """Samples prompts.

    Prints the samples with their logprobs, engines and versions of the weights. With --json, the prompts with their
    samples have the form that POST /sample answers with.
    """
    inputs = prompts.read_inputs(texts, file, raw=raw, system=system)
    sampling = prompts.read_sampling(
        num_samples, max_tokens, temperature, top_p, seed, stop, param, adapter, timeout_s=timeout
    )
    client = command.connect()
    found: list[dict[str, Any]] = []
    with command.out.progress("sampling", len(inputs)) as advance:
        for prompt in client.sample_prompts(inputs, sampling):
            found.append(prompt)
            advance(1, f"{sum(len(each['sequences']) for each in found)} samples")
    found.sort(key=lambda prompt: prompt["prompt_index"])
    lines = [line for prompt in found for line in _lines(inputs[prompt["prompt_index"]], prompt)]
    command.out.show({"prompts": found}, *lines)


def _lines(given: dict[str, Any], prompt: dict[str, Any]) -> list[RenderableType]:
    """Returns a prompt and its samples for a person."""
    from rich.text import Text

    lines: list[RenderableType] = [styled(clipped(prompts.shown(given), 200), "bold")]
    for sequence in prompt["sequences"]:
        count = len(sequence["tokens"])
        about = [f"{count} tokens"]
        if sequence["logprobs"]:
            about.append(f"logprob {sum(sequence['logprobs']):.3f}")
        about += [sequence["engine"], sequence["stop_reason"]]
        about += [sequence["adapter"]] if sequence["adapter"] else []
        about += [span["version"] for span in sequence["weight_versions"]]
        lines.append(Text.assemble("  ", printable(sequence["decoded"]), "  ", ("  ".join(about), "dim")))
    return lines


@talks
def score(
    command: Command,
    texts: prompts.Texts = None,
    file: prompts.File = None,
    raw: prompts.Raw = False,
    top_logprobs: Top = 0,
    adapter: prompts.Adapter = "",
) -> None:
    """Prints logprobs of given sequences.

    One for each token; nothing is sampled. With --json, the prompts have the form that POST /score answers with, and
    besides the text of their tokens.
    """
    from twinkle_serve.gateway.native.answers import dumps, prompts_of

    inputs = prompts.read_inputs(texts, file, raw=raw)
    client = command.connect()
    with command.out.waiting("scoring"):
        response = client.score(inputs, adapter, top_logprobs=top_logprobs, use_base_model=not adapter)
        found = [json.loads(dumps(prompt)) for prompt in prompts_of(response)]
        for prompt in found:
            del prompt["sequences"]
            prompt["token_texts"] = client.decode([[token] for token in prompt["prompt_token_ids"]])
    parts: list[RenderableType] = []
    for given, prompt in zip(inputs, found, strict=True):
        known = [value for value in prompt["prompt_logprobs"] if value is not None]
        tops = _tops(command, client, prompt) if top_logprobs and not command.out.as_json else {}
        head = f"{clipped(prompts.shown(given), 200)}  sum {sum(known):.3f}  of {len(known)} tokens"
        rows = [
            (i, token, text, value, tops.get(i, ""))
            for i, (token, text, value) in enumerate(
                zip(prompt["prompt_token_ids"], prompt["token_texts"], prompt["prompt_logprobs"], strict=True)
            )
        ]
        columns = SCORE_COLUMNS if top_logprobs else SCORE_COLUMNS[:-1]
        parts += [styled(head, "bold"), table(columns, rows, command.out.width), ""]
    command.out.show({"prompts": found}, *parts)


def _tops(command: Command, client: Any, prompt: dict[str, Any]) -> dict[int, str]:
    """Returns the likeliest tokens of each position, as text."""
    top = prompt["top_prompt_logprobs"]
    if top is None:
        return {}
    shown = {}
    for i, (tokens, values) in enumerate(zip(top["tokens"], top["logprobs"], strict=True), top["start"]):
        texts = client.decode([[token] for token in tokens])
        shown[i] = "  ".join(f"{text!r} {value:.2f}" for text, value in zip(texts, values, strict=True))
    return shown


SCORE_COLUMNS = (
    Column("position", lambda row: str(row[0]), 2, right=True),
    Column("id", lambda row: str(row[1]), 1, right=True),
    Column("token", lambda row: repr(row[2])),
    Column("logprob", lambda row: "–" if row[3] is None else f"{row[3]:.4f}", right=True),
    Column("likeliest", lambda row: row[4]),
)
