"""Overhead of the service over the bare engine: the same work through AsyncLLM and through the service, in turn.

    scripts/bench overhead [--rounds 8] [--prompts 64] [--samples 8] [--tokens 64] [--device cpu|cuda] [--eager]
        [--json FILE]

Both engines stay up with the same arguments and the same core for their computing thread, or the same GPU; one samples
while the other idles. On cuda the model is a random one of 0.2 billion parameters. Each round's ratio compares runs
next to each other in time, since the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.common.cpu_time import Round, measured
from benchmarks.common.engines import AsyncLLM, EngineArgs, cheapest_params, side_by_side
from benchmarks.common.models import large_model
from benchmarks.common.report import Figures, Report, command, quartiles
from tests.support.ray_cluster import ray_cluster
from twinkle_serve import hub
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.template import Template

ENGINE_ARGS: dict[str, EngineArgs] = {
    "cpu": {"max_model_len": 256, "dtype": "float32", "max_num_seqs": 256, "kv_cache_memory_bytes": 2**29},
    "cuda": {"max_model_len": 2048, "dtype": "bfloat16", "max_num_seqs": 512, "kv_cache_memory_bytes": 2**33},
}


async def through_engine(llm: AsyncLLM, prompts: list[list[int]], options: argparse.Namespace, number: int) -> int:
    """Samples with AsyncLLM, called in its cheapest way. Returns the number of tokens."""
    from vllm.inputs import tokens_input

    async def one(i: int) -> int:
        params = cheapest_params(options.samples, options.tokens)
        output: Any = None
        async for latest in llm.generate(tokens_input(prompts[i]), params, f"{number}-{i}"):
            output = latest
        return sum(len(sample.token_ids) for sample in output.outputs)

    return sum(await asyncio.gather(*map(one, range(len(prompts)))))


async def through_service(sampler: RunningSampler, prompts: list[list[int]], options: argparse.Namespace) -> int:
    """Samples with the service. Returns the number of tokens."""
    response = await sampler.sample_async(
        [{"input_ids": ids} for ids in prompts],
        {"max_tokens": options.tokens, "ignore_eos": True},
        num_samples=options.samples,
    )
    assert len(response.sequences) == len(prompts) * options.samples
    return len(response.columns.tokens)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", choices=ENGINE_ARGS, default="cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: a minute less to start, fewer tokens/s")
    parser.add_argument("--json", type=Path, help="write the figures here too, after every round")
    options = parser.parse_args()
    report = Report(command("overhead", options), options.json, options.device)
    engine_args = ENGINE_ARGS[options.device] | ({"enforce_eager": True} if options.eager else {})
    with tempfile.TemporaryDirectory(prefix="tsb") as temporary:
        model = str(hub.DEMO)
        if options.device == "cuda":
            model = f"{temporary}/model"
            large_model(Path(model))
        with ray_cluster(num_cpus=len(os.sched_getaffinity(0))):
            async with side_by_side(model, engine_args, options.device, same_core=True) as (sampler, llm):
                await compare(options, sampler, llm, report)
    report.finish()


async def compare(options: argparse.Namespace, sampler: RunningSampler, llm: AsyncLLM, report: Report) -> None:
    """Runs all rounds, and reports after each."""
    template = Template(hub.DEMO)
    rng = random.Random(0)
    bare: list[Round] = []
    service: list[Round] = []
    for number in range(options.rounds + 1):
        # New prompts each round, the same for both, so that the prefix cache gives nothing.
        questions = [f"{rng.randint(10, 999)}+{rng.randint(10, 999)}=" for _ in range(options.prompts)]
        prompts = [template.encode([{"role": "user", "content": q}], None, q).tolist() for q in questions]
        pair: dict[str, Round] = {}
        # The order alternates too.
        for way in ("bare", "service") if number % 2 else ("service", "bare"):
            if way == "bare":
                pair[way] = await measured(through_engine(llm, prompts, options, number))
            else:
                pair[way] = await measured(through_service(sampler, prompts, options))
        if number:  # the first round warms both up
            bare.append(pair["bare"])
            service.append(pair["service"])
            report.update(**figures(bare, service, options.prompts * options.samples))
            print(
                f"round {number}: bare {pair['bare'].units_per_s:8,.0f} tokens/s   "
                f"service {pair['service'].units_per_s:8,.0f}   "
                f"ratio {pair['service'].units_per_s / pair['bare'].units_per_s:.3f}",
                flush=True,
            )


def figures(bare: list[Round], service: list[Round], samples: int) -> Figures:
    """The figures of pairs of rounds, each of so many samples."""
    ratios = [s.units_per_s / b.units_per_s for b, s in zip(bare, service, strict=True)]

    def per_1000(rounds: list[Round], part: str | None) -> float:
        spent = [r.outside_s if part is None else r.cpu_s.get(part, 0.0) for r in rounds]
        return round(statistics.median(spent) / samples * 1000, 3)

    parts = sorted({part for r in service for part in r.cpu_s})
    return {
        "tokens_per_s": {
            "bare": round(statistics.median(r.units_per_s for r in bare)),
            "service": round(statistics.median(r.units_per_s for r in service)),
        },
        "ratio": {**quartiles(ratios), "all": [round(r, 3) for r in ratios]},
        "cpu_s_outside_engine_per_1000_samples": {"bare": per_1000(bare, None), "service": per_1000(service, None)},
        "service_cpu_s_per_1000_samples": {part: per_1000(service, part) for part in parts},
        "bare_cpu_s_per_1000_samples": {part: per_1000(bare, part) for part in parts},
    }


if __name__ == "__main__":
    uvloop.run(main())  # as Ray runs its actors
