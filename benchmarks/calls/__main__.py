"""Calls through the bare engine, vLLM's own server and the service, in turn: the same work, engine arguments and core.

    scripts/bench calls [--only single processes alone conversations adapters batch tailed] [--rounds 10]
        [--ways …] [--json FILE]

- single: 1,000 calls of one sample of 16 tokens, 64 at a time, from one process.
- processes: the same from 8 client processes with 8 calls each; the bare engine has none.
- alone: one call at a time, 50 of them.
- conversations: 32 at a time, 6 growing turns of 32 tokens.
- adapters: 64 calls of 4 samples of 32 tokens over 8 adapters.
- batch: 64 prompts of 8 samples of 64 tokens, in one call.
- tailed: 128 prompts of 4 samples of 8 to 256 tokens, most of them short, in one call with a max_tokens for each.

All return token ids and the logprob of each. A round runs each workload on each way, next to each other in time, and
ratios are of the same round, since the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeAlias

import psutil
import uvloop

from benchmarks.calls import workloads
from benchmarks.calls.clients import Clients
from benchmarks.calls.ways import Bare, Service, Way, endpoint
from benchmarks.calls.workloads import Work
from benchmarks.common.engines import SERVICE, EngineArgs, bare_engine
from benchmarks.common.report import Figures, Report, command, quartiles
from tests.support.deploy import deploy
from tests.support.lora import save_adapter
from tests.support.ray_cluster import ray_cluster
from twinkle_serve import hub

ENGINE_ARGS: EngineArgs = {
    "max_model_len": 512,
    "dtype": "float32",
    "max_num_seqs": 256,
    "kv_cache_memory_bytes": 2**29,
}
ADAPTERS = [f"lora{i}" for i in range(8)]
LORA_ARGS: EngineArgs = {"enable_lora": True, "max_loras": len(ADAPTERS), "max_lora_rank": 8}
WORKLOADS = ("single", "processes", "alone", "conversations", "adapters", "batch", "tailed")
WAYS = ("bare", "endpoint", "service")
CLIENTS, CALLS_EACH = 8, 8


class Measured:
    """One workload on one way."""

    def __init__(self, work: Work, seconds: float, cpu_s: float) -> None:
        self.tokens_per_s = work.tokens / seconds
        self.cpu_s_per_1000_samples = cpu_s / work.samples * 1000
        self.p50_ms = statistics.median(work.seconds_of_calls) * 1e3 if work.seconds_of_calls else 0.0


Results: TypeAlias = defaultdict[str, defaultdict[str, list[Measured]]]
"""By workload and way, one for each round."""


async def measured(way: Way, work: Awaitable[Work], callers: list[int]) -> Measured:
    """Times work, and the CPU time of the callers' processes and of the way's."""

    def cpu() -> dict[int, float]:
        spent = {}
        for process in [*map(psutil.Process, callers), *way.processes()]:
            try:
                times = process.cpu_times()
                spent[process.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                pass
        return spent

    before, began = cpu(), time.perf_counter()
    done = await work
    seconds = time.perf_counter() - began
    return Measured(done, seconds, sum(s - before.get(pid, 0.0) for pid, s in cpu().items()))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18765, help="of vllm serve")
    parser.add_argument("--json", type=Path, help="write the figures here too, after every round")
    options = parser.parse_args()
    report = Report(command("calls", options), options.json)
    results: Results = defaultdict(lambda: defaultdict(list))
    for lora in (False, True):  # an engine with LoRA is slower for calls without
        if only := [workload for workload in options.only if (workload == "adapters") == lora]:
            await _phase(options, only, report, results, lora=lora)
    report.finish()


async def _phase(
    options: argparse.Namespace, only: Sequence[str], report: Report, results: Results, *, lora: bool
) -> None:
    """Runs workloads on engines of one kind."""
    async with AsyncExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tsb", ignore_cleanup_errors=True)))
        adapters = {name: save_adapter(temporary / name, seed=i) for i, name in enumerate(ADAPTERS if lora else ())}
        address = stack.enter_context(ray_cluster(num_cpus=len(os.sched_getaffinity(0))))
        started = await _start(options, stack, adapters, temporary)
        clients = {}
        if "processes" in only:
            clients = await _clients(options, address, started)
            for each in clients.values():
                stack.push_async_callback(each.stop)
        await _compare(options, only, started, clients, report, results)


async def _start(
    options: argparse.Namespace, stack: AsyncExitStack, adapters: dict[str, Path], temporary: Path
) -> dict[str, Way]:
    """Starts the ways one after the other, and times it."""
    model, engine_args = str(hub.DEMO), ENGINE_ARGS | (LORA_ARGS if adapters else {})
    ways: dict[str, Way] = {}
    others: list[int] = []
    if "bare" in options.ways:
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        llm = bare_engine(model, engine_args, "cpu", same_core=True)
        stack.callback(gc.collect)  # vLLM's own finalizer fails when it runs at interpreter exit
        stack.callback(llm.shutdown)
        processes = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
        others += [each.pid for each in processes]
        ways["bare"] = Bare(llm, adapters, processes)
    if "endpoint" in options.ways:
        log = temporary / "vllm-serve.log"
        way = await stack.enter_async_context(endpoint(model, engine_args, adapters, options.port, log))
        ways["endpoint"] = way
        others += [process.pid for process in way.processes()]
    if "service" in options.ways:
        mesh = {"dp_size": 1, "device_type": "cpu"}
        sampler = await asyncio.to_thread(deploy, SERVICE, model_id=model, device_mesh=mesh, engine_args=engine_args)
        stack.callback(sampler.shutdown)
        for name, path in adapters.items():
            await asyncio.to_thread(sampler.add_adapter_to_model, name, str(path))
        ways["service"] = Service(sampler, others)
    return ways


async def _clients(options: argparse.Namespace, address: str, ways: dict[str, Way]) -> dict[str, Clients]:
    """Starts the client processes of each way that can be called from other processes."""
    targets = {"endpoint": ("endpoint", f"http://127.0.0.1:{options.port}", str(hub.DEMO))}
    targets["service"] = ("service", address, SERVICE)
    calls = 1000 // CLIENTS
    return {
        way: await Clients.start(target, CLIENTS, calls, CALLS_EACH, 1000 * i)
        for i, (way, target) in enumerate(targets.items())
        if way in ways
    }


async def _compare(
    options: argparse.Namespace,
    only: Sequence[str],
    ways: dict[str, Way],
    clients: dict[str, Clients],
    report: Report,
    results: Results,
) -> None:
    """Runs all rounds, and reports after each."""
    runs: dict[str, Callable[[Way, random.Random], Awaitable[Work]]] = {
        "single": workloads.single,
        "alone": workloads.alone,
        "conversations": workloads.conversations,
        "adapters": functools.partial(workloads.adapters, names=ADAPTERS),
        "batch": workloads.batch,
        "tailed": workloads.tailed,
    }
    for number in range(options.rounds + 1):
        for workload in only:
            for name in list(ways)[:: 1 if number % 2 else -1]:
                way = ways[name]
                if workload == "processes":
                    if name not in clients:
                        continue
                    done = await measured(way, clients[name].work(), clients[name].ids)
                else:
                    work = runs[workload](way, random.Random(f"{number} {name}"))
                    done = await measured(way, work, [os.getpid()])
                if number:  # the first round warms up
                    results[workload][name].append(done)
            if number:
                said = "   ".join(
                    f"{name} {each[-1].tokens_per_s:6,.0f} tok/s {each[-1].cpu_s_per_1000_samples:5.1f} s "
                    f"p50 {each[-1].p50_ms:5.1f} ms"
                    for name, each in results[workload].items()
                )
                print(f"round {number} {workload:14}{said}", flush=True)
        if number:
            report.update(**{workload: figures(by_way) for workload, by_way in results.items()})


def figures(by_way: Mapping[str, list[Measured]]) -> Figures:
    """Figures of one workload: medians, and ratios of the service to each other way within a round."""
    found: Figures = {
        name: {
            "tokens_per_s": round(statistics.median(each.tokens_per_s for each in rounds)),
            "cpu_s_per_1000_samples": round(statistics.median(each.cpu_s_per_1000_samples for each in rounds), 2),
            "p50_ms": round(statistics.median(each.p50_ms for each in rounds), 2),
        }
        for name, rounds in by_way.items()
    }
    for name in by_way.keys() - {"service"}:
        if "service" in by_way:
            pairs = list(zip(by_way["service"], by_way[name], strict=True))
            found[f"service over {name}"] = {
                "tokens_per_s": quartiles([s.tokens_per_s / o.tokens_per_s for s, o in pairs]),
                "cpu": quartiles([s.cpu_s_per_1000_samples / o.cpu_s_per_1000_samples for s, o in pairs]),
                "p50": quartiles([s.p50_ms / o.p50_ms for s, o in pairs if o.p50_ms]) if pairs[0][1].p50_ms else None,
            }
    return found


if __name__ == "__main__":
    uvloop.run(main())
