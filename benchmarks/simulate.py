"""Makespan of a batch on many engines, by policy: the router's own dispatcher over simulated engines.

    scripts/bench simulate [--batches 8x16 64x16 64x128 512x16 4096x2] [--slots 64] [--json FILE] [--plot FILE]

A batch of 64x16 runs on 64 engines and has 16 times the samples that they run at once, in groups of `--samples`. An
engine runs up to `--slots` sequences at once; a step gives each one token and takes BASE_S + b * SEQUENCE_S with b
sequences (`--step-s`, by default as measured on the demo model; `--measure` measures it again). It hands samples back
DELIVERY_S after they end.

The lower bound is the larger of two: all tokens at the rate of full engines, and the longest sample alone on one. No
router that does not know lengths gets near it while the longest sample takes a good part of the batch's time, so `pool`
stands beside it, the same work without placement: see `benchmarks._simulated.pooled`.

`router_ms_per_prompt` is the router's CPU: the dispatcher's, measured here, plus `--rpc-ms`, which `scripts/bench
router` measured for a prompt (encoding and answer), a sent chunk and a returned item. `saturates_at` is the number of
such engines that keep one core busy with that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._simulated import SHAPES, bound_s, lengths_of, pooled, simulate
from benchmarks.overhead import commit, cpu_model
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.groups import Group
from twinkle_serve.routing.policies import POLICIES

STEP_S = (0.0026, 0.000082)
"""Measured on the demo model on two cores, float32, by `--measure`."""

RPC_MS = (0.25, 2.0, 0.6)
"""CPU of the router per prompt, chunk and item, by `scripts/bench router --only cpu rpc`."""

POOL = "pool"


async def measured_step_s() -> tuple[float, float]:
    """Measures a vLLM engine with the demo model on this machine: a line through the steps of 1 and of 64 sequences."""
    from twinkle_serve import hub
    from twinkle_serve.engines import build_engine

    engine = build_engine(
        "vllm", "measured", str(hub.DEMO), {"max_model_len": 256, "dtype": "float32", "kv_cache_memory_bytes": 2**27}
    )
    await engine.start()
    params = SamplingParams(max_tokens=200, ignore_eos=True, logprobs=None)
    steps = {}
    for count in (1, 64, 1, 64):  # the first of each warms up
        started = time.process_time()
        await engine.sample_group(Group(id=count, prompt_ids=np.full(4, 20, np.int32), params=params, count=count))
        steps[count] = (time.process_time() - started) / 200
    await engine.stop()
    each = max(0.0, (steps[64] - steps[1]) / 63)
    return steps[1] - each, each


def batches(text: str) -> tuple[int, float]:
    """Parses `64x16` into engines and waves."""
    engines, waves = text.split("x")
    return int(engines), float(waves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["8x16", "64x16", "64x128", "512x16", "4096x2"]
    parser.add_argument("--batches", nargs="+", default=default, help="ENGINESxWAVES")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--step-s", type=float, nargs=2, default=STEP_S, metavar=("BASE_S", "SEQUENCE_S"))
    parser.add_argument("--rpc-ms", type=float, nargs=3, default=RPC_MS, metavar=("PROMPT", "CHUNK", "ITEM"))
    parser.add_argument("--measure", action="store_true", help="measure the step here first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    step_s = asyncio.run(measured_step_s()) if options.measure else tuple(options.step_s)
    rows = []
    for row in run(options, step_s):
        rows.append(row)
        print(row, flush=True)
    answer = {
        "command": f"scripts/bench simulate --batches {' '.join(options.batches)} --slots {options.slots} "
        f"--samples {options.samples} --step-s {step_s[0]:g} {step_s[1]:g} "
        f"--rpc-ms {' '.join(f'{ms:g}' for ms in options.rpc_ms)}",
        "commit": commit(),
        "machine": f"{os.cpu_count()} x {cpu_model()}, no GPU",
        "batches": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


def run(options: argparse.Namespace, step_s: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """Yields a row for each batch, shape of lengths and policy; the pool's comes first."""
    slots, samples = options.slots, options.samples
    for shape in SHAPES:
        for engines, waves in map(batches, options.batches):
            prompts = max(1, int(waves * engines * slots / samples))
            lengths = lengths_of(shape, prompts * samples, np.random.default_rng(engines)).reshape(prompts, samples)
            bound = bound_s(lengths, engines, slots, step_s)
            pool_s, delays = pooled(engines, slots, lengths, step_s)
            batch = {
                "lengths": shape,
                "engines": engines,
                "waves": waves,
                "prompts": prompts,
                "bound_s": round(bound, 2),
            }

            def row(policy: str, makespan_s: float, delays: Any, **more: float) -> dict[str, Any]:
                return {
                    **batch,  # noqa: B023  it is called before the next batch
                    "policy": policy,
                    "makespan_s": round(makespan_s, 2),
                    "ratio_to_bound": round(makespan_s / bound, 3),  # noqa: B023
                    "ratio_to_pool": round(makespan_s / pool_s, 3),  # noqa: B023
                    "queueing_mean_s": round(float(np.mean(delays)), 2),
                    "queueing_p95_s": round(float(np.percentile(delays, 95)), 2),
                    **more,
                }

            yield row(POOL, pool_s, delays)
            for policy in options.policies:
                result = simulate(policy, engines, slots, lengths, step_s, seed=0)
                prompt_ms, chunk_ms, item_ms = options.rpc_ms
                rpc_ms = (chunk_ms * result.chunks + item_ms * result.items) / prompts
                router_ms = result.cpu_us_per_prompt / 1e3 + prompt_ms + rpc_ms
                yield row(
                    policy,
                    result.makespan_s,
                    result.delays_s,
                    cpu_us_per_prompt=round(result.cpu_us_per_prompt, 1),
                    chunks_per_prompt=round(result.chunks / prompts, 3),
                    items_per_prompt=round(result.items / prompts, 3),
                    router_ms_per_prompt=round(router_ms, 3),
                    saturates_at=round(engines * result.makespan_s / (router_ms * prompts / 1e3)),
                )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots makespan and queueing delay relative to the bound, by batch, for each policy and shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(SHAPES), figsize=(10, 6.5), sharex=True, sharey="row", layout="constrained")
    names = list(dict.fromkeys(f"{row['engines']}\n{row['waves']:g} waves" for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    for column, shape in enumerate(SHAPES):
        for number, policy in enumerate(policies):
            mine = [row for row in rows if row["lengths"] == shape and row["policy"] == policy]
            places = np.arange(len(mine)) + (number - (len(policies) - 1) / 2) * 0.8 / len(policies)
            width = 0.8 / len(policies)
            panels[0][column].bar(places, [r["ratio_to_bound"] for r in mine], width, label=policy)
            delays = [r["queueing_p95_s"] / r["bound_s"] for r in mine]
            panels[1][column].bar(places, delays, width)
        panels[0][column].set(title=f"{shape} lengths")
        panels[0][column].axhline(1.05, color="black", linewidth=0.8, linestyle=":")
        panels[1][column].set(xticks=range(len(names)), xticklabels=names, xlabel="engines")
        for panel in panels[:, column]:
            panel.grid(alpha=0.3, axis="y")
            panel.set_axisbelow(True)
    panels[0][0].set(ylabel="makespan / lower bound", ylim=(0.9, None))
    panels[1][0].set(ylabel="p95 of queueing / lower bound")
    panels[0][0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
