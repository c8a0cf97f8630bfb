"""How soon samples come from new weights, how updates affect running samples, and their cost in memory.

    scripts/bench weights [--rounds 10] [--ranks 8 16 32 64] [--versions 200] [--only adapters | model]
        [--device cpu | cuda] [--eager] [--quick] [--json FILE]

Times weights from tensors in this process to their first sampled token: through the service, which stores, checks and
publishes them, and in turn through the bare engine, which loads the same files from memory. Both engines stay up with
the same arguments; one works while the other idles.

- adapters: LoRA adapters of the demo model, of several ranks, and memory after many versions.
- model: the weights of the demo model and of one of 0.2 billion parameters; updates sent as deltas; the longest gap in
  streams around an update; memory after many versions; peak memory of an update.

--quick measures times only, of adapters and model on one service with the larger model.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.common.engines import EngineArgs, side_by_side
from benchmarks.common.models import large_model
from benchmarks.common.report import Figures, Report, command
from benchmarks.weights import adapters, model
from benchmarks.weights.memory import MEMORY, service_processes
from tests.support.ray_cluster import ray_cluster
from twinkle_serve import hub

ENGINE_ARGS: dict[str, EngineArgs] = {
    "cpu": {"max_model_len": 256, "dtype": "float32", "kv_cache_memory_bytes": 2**28},
    "cuda": {"max_model_len": 256, "dtype": "bfloat16", "kv_cache_memory_bytes": 2**32},
}
LORA_ARGS = {"enable_lora": True, "max_lora_rank": 64}
LARGE_ROUNDS = 4
"""At most so many updates of the larger model."""


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--versions", type=int, default=200)
    parser.add_argument("--only", choices=["adapters", "model"], help="leave the other half out")
    parser.add_argument("--device", choices=ENGINE_ARGS, default="cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: a minute less to start")
    parser.add_argument("--quick", action="store_true", help="times only, on one service")
    parser.add_argument("--json", type=Path, help="write the figures here too, as they come")
    options = parser.parse_args()
    report = Report(command("weights", options), options.json, options.device)
    with (
        tempfile.TemporaryDirectory(prefix="bench-weights-", dir=MEMORY) as memory,
        ray_cluster(num_cpus=len(os.sched_getaffinity(0))),
    ):
        if options.quick:
            await quick(options, Path(memory), report)
        else:
            if options.only != "model":
                await measure_adapters(options, Path(memory), report)
            if options.only != "adapters":
                await measure_model(options, Path(memory), report)
    report.finish()


def engine_args(options: argparse.Namespace, *, lora: bool) -> EngineArgs:
    return (
        ENGINE_ARGS[options.device] | (LORA_ARGS if lora else {}) | ({"enforce_eager": True} if options.eager else {})
    )


async def quick(options: argparse.Namespace, memory: Path, report: Report) -> None:
    """Times of adapters and model updates, on one service with the larger model."""
    path = memory / "large"
    weights = large_model(path, ENGINE_ARGS[options.device]["dtype"])
    async with side_by_side(str(path), engine_args(options, lora=True), options.device) as (sampler, llm):
        if options.only != "model":
            bare, made, times = adapters.Bare(llm, memory), adapters.Adapters(path), {}
            for rank in options.ranks:
                times[f"rank {rank}"] = await adapters.first_sample(options.rounds, rank, made, bare, sampler)
                report.update(adapters={"first_sample_ms": times})
        if options.only != "adapters":
            reloading = model.Bare(llm, path, memory)
            figures = await model.first_sample(min(options.rounds, LARGE_ROUNDS), "0.2B", weights, reloading, sampler)
            report.update(model={"0.2B": figures})
            changes = await model.deltas(min(options.rounds, LARGE_ROUNDS), "0.2B", weights, sampler)
            report.update(model={"0.2B": figures, "0.2B deltas": changes})


async def measure_adapters(options: argparse.Namespace, memory: Path, report: Report) -> None:
    async with side_by_side(str(hub.DEMO), engine_args(options, lora=True), options.device) as (sampler, llm):
        bare, made, times = adapters.Bare(llm, memory), adapters.Adapters(hub.DEMO), {}
        for rank in options.ranks:
            times[f"rank {rank}"] = await adapters.first_sample(options.rounds, rank, made, bare, sampler)
            report.update(adapters={"first_sample_ms": times})
        memory_mib = await adapters.memory_of_versions(options.versions, made, sampler, service_processes())
        report.update(adapters={"first_sample_ms": times, "memory_mib": memory_mib})


async def measure_model(options: argparse.Namespace, memory: Path, report: Report) -> None:
    arguments, figures = engine_args(options, lora=False), Figures()
    weights = load_file(hub.DEMO / "model.safetensors")
    async with side_by_side(str(hub.DEMO), arguments, options.device) as (sampler, llm):
        bare = model.Bare(llm, hub.DEMO, memory)
        figures["demo"] = await model.first_sample(options.rounds, "demo", weights, bare, sampler)
        report.update(model=figures)
        figures["longest_gap_ms"] = await asyncio.to_thread(model.gaps, sampler, weights, options.rounds)
        report.update(model=figures)
        figures["memory_mib"] = await model.memory_of_versions(options.versions, sampler, weights, service_processes())
        report.update(model=figures)
    path = memory / "large"
    weights = large_model(path, arguments["dtype"])
    async with side_by_side(str(path), arguments, options.device) as (sampler, llm):
        bare = model.Bare(llm, path, memory)
        figures["0.2B"] = await model.first_sample(min(options.rounds, LARGE_ROUNDS), "0.2B", weights, bare, sampler)
        report.update(model=figures)
        figures["0.2B deltas"] = await model.deltas(min(options.rounds, LARGE_ROUNDS), "0.2B", weights, sampler)
        report.update(model=figures)
        # Apart from the timed rounds: polling memory this often takes a good part of a core.
        figures["peak_memory_mib"] = await model.peak_memory(sampler, weights, service_processes())
        report.update(model=figures)


if __name__ == "__main__":
    asyncio.run(main())
