"""`twinkle-serve bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from twinkle_serve.cli import prompts
from twinkle_serve.cli.load import Measured, run_load
from twinkle_serve.cli.options import Command, talks
from twinkle_serve.cli.tables import fields, number, seconds, styled

Concurrency = Annotated[int, typer.Option("--concurrency", "-c", min=1, max=1024, help="Calls at a time.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.1, help="How long calls are begun.")]
Calls = Annotated[int | None, typer.Option("--calls", min=1, help="Most calls. [default: as many as there is time]")]
Batch = Annotated[int, typer.Option("--prompts", min=1, help="Prompts of each call.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of each sample; all of them are sampled.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: twinkle-serve bench --concurrency 16 --seconds 10")(bench)


@talks
def bench(
    command: Command,
    texts: prompts.Texts = None,
    file: prompts.File = None,
    raw: prompts.Raw = False,
    concurrency: Concurrency = 8,
    for_seconds: Seconds = 10.0,
    calls: Calls = None,
    batch: Batch = 1,
    num_samples: prompts.Number = 1,
    max_tokens: MaxTokens = 64,
    temperature: prompts.Temperature = 1.0,
    adapter: prompts.Adapter = "",
    timeout: prompts.Timeout = None,
) -> None:
    """Measures tokens/s and latency under load.

    Each of --concurrency callers sends a call as soon as its last one has ended. Without prompts, each call has sums of
    its own, so that only the beginning is in the prefix cache. It measures this machine's client, too: by handle or by
    a gateway, as the options say. The service's other callers share its engines meanwhile.
    """
    given = prompts.read_inputs(texts, file, raw=raw) if texts or file else None
    params = ["ignore_eos=true", "logprobs=null"]
    sampling = prompts.read_sampling(
        num_samples, max_tokens, temperature, params=params, adapter=adapter, timeout_s=timeout
    )
    client = command.connect()
    inputs = _inputs(given, batch)
    client.sample(inputs(0), sampling)  # the first call is not measured: it opens connections
    with command.out.progress(f"{concurrency} callers", for_seconds) as advance:
        measured = run_load(
            client,
            inputs,
            sampling,
            concurrency=concurrency,
            seconds=for_seconds,
            max_calls=calls,
            progress=_shown(advance),
        )
    setup = {"concurrency": concurrency, "prompts": batch, "num_samples": num_samples, "max_tokens": max_tokens}
    command.out.show({**setup, **measured.plain}, *_lines(measured))


def _inputs(given: Sequence[Mapping[str, Any]] | None, batch: int) -> Callable[[int], Sequence[Mapping[str, Any]]]:
    """Returns the inputs of a call by its number: the given ones in turn, or sums."""

    def of_call(number: int) -> Sequence[Mapping[str, Any]]:
        first = number * batch
        if given is None:
            return [prompts.as_input(f"{100 + i * 7 % 900}+{100 + i * 13 % 900}=") for i in range(first, first + batch)]
        return [given[i % len(given)] for i in range(first, first + batch)]

    return of_call


def _shown(advance: Callable[[float, str], None]) -> Callable[[Measured], None]:
    """Returns a function that moves the progress bar to the time that has passed."""
    shown_s = 0.0

    def show(measured: Measured) -> None:
        nonlocal shown_s
        rate = measured.tokens / max(measured.seconds, 1e-9)
        advance(measured.seconds - shown_s, f"{number(rate)} tokens/s")
        shown_s = measured.seconds

    return show


def _lines(measured: Measured) -> list[Any]:
    found = measured.plain
    latency = "  ".join(f"{name} {seconds(value)}" for name, value in found["latency_s"].items())
    lines: list[Any] = [
        fields(
            [
                ("throughput", f"{number(found['tokens_per_s'])} tokens/s  {number(found['calls_per_s'])} calls/s"),
                ("latency", latency),
                (
                    "done",
                    f"{number(found['calls'])} calls, {number(found['samples'])} samples, "
                    f"{number(found['tokens'])} tokens in {found['seconds']:.1f} s",
                ),
            ]
        )
    ]
    if measured.errors:
        lines.append(styled(f"{len(measured.errors)} calls failed, the first with {measured.errors[0]}", "bold red"))
    return lines
