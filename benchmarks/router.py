"""The router on a real cluster: calls per second, CPU per prompt, latency of control calls, and of cancels.

    scripts/bench router [--engine fake] [--only calls cpu rpc control cancel] [--rounds 5] [--json FILE]

- calls: `--calls` calls of one prompt and `--samples` samples each, 64 at a time, through `connect` and `sample_async`,
  in turn with a reference graph: a trivial router, called by handle, 64 at a time, that calls a deployment of the same
  engine kind once per sample and gathers the answers. It checks nothing, encodes nothing, tracks no load, and returns a
  list of columns. Both get the same token ids, and every sample has `--tokens` tokens.
- cpu: CPU time of the processes during calls of 64 prompts of 8 samples.
- rpc: the router's CPU time per sent chunk and per returned item, by themselves.
- control: `status` from a separate process every 20 ms, from when 10,000 prompts are sent until none waits, or 20 s.
- cancel: see `benchmarks/_cancel.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve

import twinkle_serve
from benchmarks._cancel import cancels
from benchmarks._one_by_one import OneByOne, OneEngine
from benchmarks._rpc import Callee, Caller
from benchmarks.overhead import commit, cpu_model, measured
from graphs.sampler import build
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SamplingParams

AT_A_TIME = 64
PROMPT_TOKENS = 32
QUEUED = 10_000
PERIOD_S = 0.02
WATCH_S = 20.0
VLLM_ARGS = {"max_model_len": 256, "dtype": "float32", "max_num_seqs": 256, "kv_cache_memory_bytes": 2**28}


@ray.remote(num_cpus=0)
class Prober:
    """Calls `status`, in a separate process."""

    def __init__(self, name: str) -> None:
        self._sampler = twinkle_serve.connect(name)

    async def watch(self, seconds: float, until_empty: bool) -> tuple[list[float], int]:
        """Calls every PERIOD_S, whether or not the last call was answered. Returns latencies, s, and the most groups
        seen waiting."""
        latencies: list[float] = []
        waiting = [0]
        over = asyncio.Event()

        async def ask() -> None:
            sent = time.perf_counter()
            status = await self._sampler._client.call_async("status", timeout_s=60.0)
            latencies.append(time.perf_counter() - sent)
            waiting.append(status["groups_waiting"])
            if until_empty and max(waiting) and not waiting[-1]:
                over.set()

        began, asked = time.perf_counter(), []
        while not over.is_set() and (due := len(asked) * PERIOD_S) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            asked.append(asyncio.create_task(ask()))
        await asyncio.gather(*asked)
        return latencies, max(waiting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"calls": calls, "cpu": cpu, "rpc": rpc, "control": control, "cancel": cancel}
    parser.add_argument("--engine", choices=["fake", "vllm"], default="fake", help="of calls, cpu and cancel")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": f"scripts/bench router --engine {options.engine} --only {' '.join(options.only)} "
        f"--rounds {options.rounds} --calls {options.calls} --samples {options.samples} --tokens {options.tokens}",
        "commit": commit(),
        "machine": f"{os.cpu_count()} x {cpu_model()}, no GPU",
    }
    with tempfile.TemporaryDirectory(prefix="tsb") as temporary:
        # Logical cores: the service and the reference are deployed side by side, and one of them works at a time.
        ray.init(num_cpus=8, namespace="serve", _temp_dir=temporary, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"location": "NoServer"})
        for part in options.only:
            result[part] = asyncio.run(parts[part](options))
            print(part, json.dumps(result[part], indent=2), flush=True)
        serve.shutdown()
        ray.shutdown()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def engine_args(options: argparse.Namespace) -> dict[str, Any]:
    return dict(VLLM_ARGS) if options.engine == "vllm" else {}


async def started(name: str, engine: str, engine_args: dict[str, Any]) -> Any:
    """Deploys a service with one engine and returns its sampler."""
    args = ServiceArgs.model_validate(
        {
            "model_id": "demo",
            "engine": engine,
            "device_mesh": {"dp_size": 1, "device_type": "cpu"},
            "engine_args": engine_args,
        }
    )
    target = serve.RunTarget(build(args), name=name, route_prefix=None)
    await asyncio.to_thread(serve.run_many, [target])
    sampler = await asyncio.to_thread(twinkle_serve.connect, name)
    await sampler.sample_async(prompts_of(1, 0)[0], {"max_tokens": 1})
    return sampler


def prompts_of(count: int, seed: int, length: int = PROMPT_TOKENS) -> list[dict[str, Any]]:
    ids = np.random.default_rng(seed).integers(32, 127, (count, length)).astype(np.int32)
    return [{"input_ids": row} for row in ids]


async def each(prompts: Sequence[Any], call: Callable[[Any], Awaitable[Any]]) -> None:
    """Calls with each prompt, AT_A_TIME at a time."""
    rest: Iterator[Any] = iter(prompts)

    async def worker() -> None:
        for prompt in rest:
            await call(prompt)

    await asyncio.gather(*(worker() for _ in range(AT_A_TIME)))


async def calls(options: argparse.Namespace) -> dict[str, Any]:
    """Calls per second through the service and through the reference, in turn."""
    sampler = await started("sampler", options.engine, engine_args(options))
    one_by_one: Any = OneByOne
    one_engine: Any = OneEngine
    graph = one_by_one.bind(one_engine.bind(options.engine, engine_args(options)))
    reference = await asyncio.to_thread(serve.run, graph, name="reference", route_prefix=None)
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True)

    async def through_service(prompt: Any) -> None:
        response = await sampler.sample_async(prompt, params, num_samples=options.samples)
        assert len(response.sequences) == options.samples

    async def through_reference(prompt: Any) -> None:
        samples = await reference.sample.remote(prompt["input_ids"], params, options.samples)
        assert len(samples) == options.samples

    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds + 1):
        prompts = prompts_of(options.calls if number else AT_A_TIME, number)
        pair: dict[str, Any] = {}
        ways = {"service": through_service, "reference": through_reference}
        for way in list(ways) if number % 2 else list(ways)[::-1]:
            pair[way] = await measured(counted(each(prompts, ways[way]), len(prompts)))
        if number:  # the first round warms both up
            rounds.append(pair)
            print(f"round {number}: {pair['service'].seconds:.2f} s, reference {pair['reference'].seconds:.2f} s")
    await asyncio.to_thread(serve.delete, "reference")
    await asyncio.to_thread(serve.delete, "sampler")
    ratios = [pair["reference"].seconds / pair["service"].seconds for pair in rounds]
    return {
        "calls_per_s": {
            way: round(options.calls / statistics.median(pair[way].seconds for pair in rounds), 1) for way in rounds[0]
        },
        "ratio": {**quartiles(ratios), "all": [round(ratio, 2) for ratio in ratios]},
        "cpu_ms_per_call": {way: cpu_ms([pair[way] for pair in rounds], options.calls) for way in rounds[0]},
    }


async def counted(work: Awaitable[None], count: int) -> int:
    await work
    return count


def cpu_ms(rounds: Sequence[Any], units: int) -> dict[str, float]:
    """CPU of each part of the system, median of rounds, ms per unit."""
    parts = sorted({part for each_round in rounds for part in each_round.cpu_s})
    return {part: round(statistics.median(r.cpu_s.get(part, 0.0) for r in rounds) / units * 1e3, 3) for part in parts}


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


async def cpu(options: argparse.Namespace) -> dict[str, Any]:
    """CPU per prompt in calls of 64 prompts of 8 samples: `alike`, all of one length, the cheapest case; and `apart`,
    of different lengths (16 tokens of the vocabulary end a sample), so that samples return a few at a time."""
    sampler = await started("sampler", options.engine, engine_args(options))
    repeats, result = 4, {}
    ways = {
        "alike": {"max_tokens": options.tokens, "ignore_eos": True},
        "apart": {"max_tokens": 200, "stop": list(range(32, 48))},
    }

    async def work(seed: int, params: dict[str, Any]) -> int:
        for number in range(repeats):
            await sampler.sample_async(prompts_of(64, seed + number), params, num_samples=8)
        return repeats * 64

    for way, params in ways.items():
        rounds = [await measured(work(1000 + repeats * number, params)) for number in range(options.rounds + 1)][1:]
        result[way] = {
            "seconds_per_call": round(statistics.median(r.seconds for r in rounds) / repeats, 3),
            "ms_per_prompt": cpu_ms(rounds, repeats * 64),
            "ms_per_sample": cpu_ms(rounds, repeats * 64 * 8),
            "router_ms_per_prompt": quartiles([r.cpu_s["router replica"] / repeats / 64 * 1e3 for r in rounds]),
        }
    await asyncio.to_thread(serve.delete, "sampler")
    return result


async def rpc(options: argparse.Namespace) -> dict[str, Any]:
    """CPU ms of the router's process; see `benchmarks/_rpc.py`."""
    caller, callee, count = Caller, Callee, 500
    graph = caller.bind(callee.bind())  # type: ignore[attr-defined]
    handle: Any = await asyncio.to_thread(serve.run, graph, name="rpc", route_prefix=None)
    spent: dict[str, list[float]] = {"chunk_ms": [], "item_ms": []}
    for number in range(options.rounds + 1):
        chunk_ms, item_ms = await handle.submits.remote(count), await handle.items.remote(count)
        if number:  # the first round warms both up
            spent["chunk_ms"].append(chunk_ms)
            spent["item_ms"].append(item_ms)
    await asyncio.to_thread(serve.delete, "rpc")
    return {name: quartiles(values) for name, values in spent.items()}


async def control(options: argparse.Namespace) -> dict[str, Any]:
    """Latency of `status` on an idle service, and while 10,000 prompts wait, of one call or of ten.

    The fake engine does 500 prompts per second with little CPU, so queues last for about 20 s.
    """
    name = "queued"
    sampler = await started(name, "fake", {"token_latency_s": 1.0, "max_num_seqs": 4000})
    prober = Prober.remote(name)  # type: ignore[attr-defined]
    result = {"idle": latencies(await prober.watch.remote(5.0, False))}
    for count in (1, 10):
        prompts = prompts_of(QUEUED, count)
        size = QUEUED // count
        watching = prober.watch.remote(WATCH_S, True)
        await asyncio.sleep(5 * PERIOD_S)  # the prober's calls are under way
        sent = [
            asyncio.create_task(sampler.sample_async(prompts[i : i + size], {"max_tokens": 1}, num_samples=8))
            for i in range(0, QUEUED, size)
        ]
        result[f"{count} calls of {size}"] = latencies(await watching)
        await asyncio.gather(*sent)
    await asyncio.to_thread(serve.delete, name)
    return result


def latencies(watched: tuple[Sequence[float], int]) -> dict[str, Any]:
    values, waiting = watched
    marks = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "max_ms": 100}
    found = {mark: round(float(np.percentile(values, at)) * 1e3, 1) for mark, at in marks.items()}
    return {**found, "calls": len(values), "most_waiting": waiting}


async def cancel(options: argparse.Namespace) -> dict[str, Any]:
    """How soon an engine frees the slots of cancelled sequences."""
    arguments: dict[str, Any] = {"max_model_len": 2048}
    arguments |= {"token_latency_s": 0.005} if options.engine == "fake" else {"dtype": "float32"}
    arguments |= {} if options.engine == "fake" else {"kv_cache_memory_bytes": 2**28}
    result = {}
    for slots in (1, 2):
        sampler = await started(f"slots{slots}", options.engine, {**arguments, "max_num_seqs": slots})
        result |= await asyncio.to_thread(cancels, sampler, slots, 2048, max(5, options.rounds))
        await asyncio.to_thread(serve.delete, f"slots{slots}")
    return result


if __name__ == "__main__":
    main()
