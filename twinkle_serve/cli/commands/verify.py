"""`twinkle-serve verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinkle_serve.cli import prompts
from twinkle_serve.cli.client import Client, Target, open_client
from twinkle_serve.cli.exits import FAILED, CommandError
from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.quiet import quiet_engines
from twinkle_serve.cli.tables import Column, fields, styled, table

if TYPE_CHECKING:
    from twinkle_serve.sampler.verification import Verification

SUMS = ("12+34=", "345-78=", "7+99=", "610-245=")
"""Prompts unless others are given: the demo model's."""
TORCH, SELF = "torch", "self"

Against = Annotated[
    str,
    typer.Option(
        help="The second engine: torch (PyTorch in float32, in this process), self (the same service scores), the URL "
        "of a gateway, or the name of an application on the Ray cluster."
    ),
]
Model = Annotated[str | None, typer.Option(help="Model for torch. [default: that of the service]")]
AdapterDirectory = Annotated[Path | None, typer.Option(help="Directory of --adapter, for torch.")]
Tolerance = Annotated[float, typer.Option(min=0, help="Largest difference that passes, nats.")]
Worst = Annotated[int, typer.Option(min=0, help="Tokens to show, those with the largest differences.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: twinkle-serve verify '12+34=' --against torch")(verify)


@talks
def verify(
    command: Command,
    texts: prompts.Texts = None,
    file: prompts.File = None,
    raw: prompts.Raw = False,
    num_samples: prompts.Number = 4,
    max_tokens: prompts.MaxTokens = 16,
    temperature: prompts.Temperature = 1.0,
    seed: prompts.Seed = None,
    adapter: prompts.Adapter = "",
    against: Against = TORCH,
    model: Model = None,
    adapter_dir: AdapterDirectory = None,
    tolerance: Tolerance = 1e-3,
    worst: Worst = 5,
) -> None:
    """Compares logprobs with a second engine.

    Samples prompts, scores the samples on the second engine, and compares token by token. Exits with 1 where the
    largest difference is above --tolerance.
    """
    inputs = prompts.read_inputs(texts, file, raw=raw) if texts or file else [prompts.as_input(each) for each in SUMS]
    sampling = prompts.read_sampling(num_samples, max_tokens, temperature, seed=seed, adapter=adapter)
    client = command.connect()
    with command.out.waiting("sampling"):
        response = client.sample(inputs, sampling)
    with command.out.waiting(f"scoring on {against}"):
        found = _compare(command, client, response, against, model, adapter, adapter_dir, worst)
        texts_of = _texts(client, found)
    data = _plain(found, texts_of, tolerance)
    command.out.show(data, *_lines(command, found, texts_of, tolerance, against))
    if not data["passed"]:
        raise typer.Exit(FAILED)


def _compare(
    command: Command,
    client: Client,
    response: Any,
    against: str,
    model: str | None,
    adapter: str,
    adapter_dir: Path | None,
    worst: int,
) -> Verification:
    """Scores samples on the second engine."""
    from twinkle_serve.sampler.verification import verify

    if against == SELF:
        return verify(response, client, None, worst, same_service=True)
    if against == TORCH:
        with quiet_engines():
            sampler = _torch(client, model, adapter, adapter_dir)
            try:
                return verify(response, sampler, None, worst)
            finally:
                sampler.shutdown()
    target = command.target
    if against.startswith(("http://", "https://")):
        other = open_client(Target(url=against, key=target.key))
    else:
        other = open_client(Target(service=against, address=target.address))
    return verify(response, other, None, worst)


def _torch(client: Client, model: str | None, adapter: str, directory: Path | None) -> Any:
    """Starts the service's model on PyTorch in this process.

    Raises:
        CommandError: the service has other weights than the model's checkpoint, or the adapter is not here.
    """
    from twinkle_serve.data_format.weights import INITIAL_LABEL
    from twinkle_serve.sampler import TorchSampler

    status = client.status()
    if status["weights"] != INITIAL_LABEL and model is None:
        raise CommandError(
            f"the service has weights {status['weights']!r}, and torch would load the checkpoint of "
            f"{status['model_id']!r}. Name a directory with these weights with --model, or use --against self."
        )
    if adapter and directory is None:
        raise CommandError(f"torch needs the files of {adapter}: give --adapter-dir, or use --against self.")
    sampler = TorchSampler(model or status["model_id"], {"dtype": "float32"})
    if directory is not None:
        sampler.add_adapter_to_model(adapter.partition("@")[0], directory)
    return sampler


def _texts(client: Client, found: Verification) -> list[str]:
    """Returns the text of each of the worst tokens."""
    return client.decode([[token.token_id] for token in found.worst_tokens]) if found.worst_tokens else []


def _plain(found: Verification, texts: list[str], tolerance: float) -> dict[str, Any]:
    """Returns a comparison as plain values."""
    return {
        "passed": found.max_abs_difference <= tolerance,
        "tolerance": tolerance,
        "tokens": found.tokens,
        "max_abs_difference": found.max_abs_difference,
        "mean_abs_difference": found.mean_abs_difference,
        "kl": found.kl,
        "kl_k1": found.kl_k1,
        "effective_sample_size": found.effective_sample_size,
        "worst_tokens": [
            {**asdict(token), "text": text} for token, text in zip(found.worst_tokens, texts, strict=True)
        ],
    }


def _lines(command: Command, found: Verification, texts: list[str], tolerance: float, against: str) -> list[Any]:
    passed = found.max_abs_difference <= tolerance
    verdict = "passed" if passed else "failed"
    sign = "≤" if passed else ">"
    lines: list[Any] = [
        styled(
            f"{verdict}: {found.max_abs_difference:.2e} {sign} {tolerance:g} nats", "green" if passed else "bold red"
        ),
        fields(
            [
                ("compared", f"{found.tokens} tokens, against {against}"),
                ("mean |Δ|", f"{found.mean_abs_difference:.2e} nats"),
                ("KL", f"{found.kl:.2e} nats per token (k1 {found.kl_k1:.2e})"),
                ("effective", f"{100 * found.effective_sample_size:.2f}% of the samples"),
            ]
        ),
    ]
    if found.worst_tokens:
        rows = list(zip(found.worst_tokens, texts, strict=True))
        lines += ["", table(WORST_COLUMNS, rows, command.out.width)]
    return lines


WORST_COLUMNS = (
    Column("prompt", lambda row: str(row[0].prompt_index), 3, right=True),
    Column("sample", lambda row: str(row[0].sample_index), 2, right=True),
    Column("token", lambda row: str(row[0].token_index), 1, right=True),
    Column("text", lambda row: repr(row[1])),
    Column("sampled", lambda row: f"{row[0].sampled_logprob:.5f}", right=True),
    Column("other", lambda row: f"{row[0].other_logprob:.5f}", right=True),
    Column("difference", lambda row: f"{row[0].difference:+.1e}", right=True),
)
