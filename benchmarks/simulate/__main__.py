"""Makespan of a batch on many engines, by policy: the router's own dispatcher over simulated engines.

    scripts/bench simulate [--batches 8x16 64x16 64x128 512x16 4096x2] [--slots 64] [--json FILE] [--plot FILE]

A batch of 64x16 runs on 64 engines and has 16 times the samples that they run at once, in groups of `--samples`. An
engine runs up to `--slots` sequences at once; a step gives each one token and takes BASE_S + b * SEQUENCE_S with b
sequences (`--step-s`, by default as measured on the demo model; `--measure` measures it again). It hands samples back
DELIVERY_S after they end.

The lower bound is the larger of two: all tokens at the rate of full engines, and the longest sample alone on one. No
router that does not know lengths gets near it while the longest sample takes a good part of the batch's time, so `pool`
stands beside it, the same work without placement: see `benchmarks.simulate.pool.pooled`.

`router_ms_per_prompt` is the router's CPU: the dispatcher's, measured here, plus `--rpc-ms`, which `scripts/bench
router` measured for a prompt (encoding and answer), a sent chunk and a returned item. `saturates_at` is the number of
such engines that keep one core busy with that.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.report import Figures, Report, command
from benchmarks.simulate.lengths import SHAPES, lengths_of
from benchmarks.simulate.plot import plot
from benchmarks.simulate.policies import POLICIES
from benchmarks.simulate.pool import bound_s, pooled
from benchmarks.simulate.simulation import Result, simulate
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.sampling_params import DecodingParams

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
    params = DecodingParams(max_tokens=200, ignore_eos=True, logprobs=None)
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
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--step-s", type=float, nargs=2, default=STEP_S, metavar=("BASE_S", "SEQUENCE_S"))
    parser.add_argument("--rpc-ms", type=float, nargs=3, default=RPC_MS, metavar=("PROMPT", "CHUNK", "ITEM"))
    parser.add_argument("--measure", action="store_true", help="measure the step here first")
    parser.add_argument("--json", type=Path, help="write the figures here too, after every row")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.measure:
        options.step_s = asyncio.run(measured_step_s())
    report = Report(command("simulate", options), options.json)
    rows: list[Figures] = []
    for row in run(options):
        rows.append(row)
        report.update(batches=rows)
        print(row, flush=True)
    if options.plot:
        plot(rows, options.plot)
    report.finish()


def run(options: argparse.Namespace) -> Iterator[Figures]:
    """Yields a row for each batch, shape of lengths and policy; the pool's comes first."""
    slots, samples, step_s = options.slots, options.samples, tuple(options.step_s)
    for shape in SHAPES:
        for engines, waves in map(batches, options.batches):
            prompts = max(1, int(waves * engines * slots / samples))
            lengths = lengths_of(shape, prompts * samples, np.random.default_rng(engines)).reshape(prompts, samples)
            pool_s, delays = pooled(engines, slots, lengths, step_s)
            batch = {
                "lengths": shape,
                "engines": engines,
                "waves": waves,
                "prompts": prompts,
                "bound_s": round(bound := bound_s(lengths, engines, slots, step_s), 2),
            }
            yield {**batch, "policy": POOL, **times(pool_s, delays, bound, pool_s)}
            for policy in options.policies:
                result = simulate(policy, engines, slots, lengths, step_s, seed=0)
                yield {
                    **batch,
                    "policy": policy,
                    **times(result.makespan_s, result.delays_s, bound, pool_s),
                    **router_cost(result, engines, prompts, options.rpc_ms),
                }


def times(makespan_s: float, delays: Sequence[float], bound: float, pool_s: float) -> dict[str, float]:
    return {
        "makespan_s": round(makespan_s, 2),
        "ratio_to_bound": round(makespan_s / bound, 3),
        "ratio_to_pool": round(makespan_s / pool_s, 3),
        "queueing_mean_s": round(float(np.mean(delays)), 2),
        "queueing_p95_s": round(float(np.percentile(delays, 95)), 2),
    }


def router_cost(result: Result, engines: int, prompts: int, rpc_ms: Sequence[float]) -> dict[str, float]:
    prompt_ms, chunk_ms, item_ms = rpc_ms
    router_ms = (
        result.cpu_us_per_prompt / 1e3 + prompt_ms + (chunk_ms * result.chunks + item_ms * result.items) / prompts
    )
    return {
        "cpu_us_per_prompt": round(result.cpu_us_per_prompt, 1),
        "chunks_per_prompt": round(result.chunks / prompts, 3),
        "items_per_prompt": round(result.items / prompts, 3),
        "router_ms_per_prompt": round(router_ms, 3),
        "saturates_at": round(engines * result.makespan_s / (router_ms * prompts / 1e3)),
    }


if __name__ == "__main__":
    main()
