"""Overhead of the service over the bare engine: the same work through AsyncLLM and through the service, in turn.

    scripts/bench overhead [--rounds 8] [--prompts 64] [--samples 8] [--tokens 64] [--device cpu|cuda] [--json FILE]

Both engines stay up with the same arguments and the same core for their computing thread, or the same GPU; one samples
while the other idles. On cuda the model is a random one of 0.2 billion parameters. Each round's ratio compares runs
next to each other in time, since the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import uvloop
from ray import serve

import twinkle_serve
from benchmarks.base_weights import large_model
from graphs.sampler import build
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.engines.vllm import cpu_defaults
from twinkle_serve.placement import cores_of_engine
from twinkle_serve.template import Template

ENGINE_ARGS: dict[str, dict[str, Any]] = {
    "cpu": {"max_model_len": 256, "dtype": "float32", "max_num_seqs": 256, "kv_cache_memory_bytes": 2**29},
    "cuda": {"max_model_len": 2048, "dtype": "bfloat16", "max_num_seqs": 512, "kv_cache_memory_bytes": 2**33},
}


@dataclass
class Round:
    seconds: float
    tokens: int
    cpu_s: dict[str, float]
    """CPU seconds of this round by part of the system."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def outside_s(self) -> float:
        """CPU seconds spent outside the engine's core and worker."""
        return sum(seconds for part, seconds in self.cpu_s.items() if part != "engine core and worker")


class Bare:
    """AsyncLLM in this process, called in its cheapest way."""

    def __init__(self, model: str, device: str, engine_args: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if device == "cpu":
            cores = cores_of_engine(0, 1, 1, sorted(os.sched_getaffinity(0)))
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[0]))
            engine_args = cpu_defaults(model, engine_args, 1)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, disable_log_stats=True, **engine_args))

    async def run(self, prompts: list[list[int]], samples: int, tokens: int, round_number: int) -> int:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        async def one(i: int) -> int:
            params = SamplingParams(
                n=samples,
                max_tokens=tokens,
                ignore_eos=True,
                temperature=1.0,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,
            )
            output: Any = None
            async for latest in self.llm.generate(tokens_input(prompts[i]), params, f"{round_number}-{i}"):
                output = latest
            return sum(len(sample.token_ids) for sample in output.outputs)

        return sum(await asyncio.gather(*map(one, range(len(prompts)))))


async def through_service(sampler: Any, prompts: list[list[int]], samples: int, tokens: int) -> int:
    response = await sampler.sample_async(
        [{"input_ids": ids} for ids in prompts], {"max_tokens": tokens, "ignore_eos": True}, num_samples=samples
    )
    assert len(response.sequences) == len(prompts) * samples
    return len(response.columns.tokens)


def part_of(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    # The process title is not always set, so look at the parents too.
    if "VLLM" in title or any(":engine-dp" in " ".join(parent.cmdline()) for parent in process.parents()):
        return "engine core and worker"
    if process.pid == os.getpid():
        return "caller"
    if "engine-dp" in title:
        return "engine replica"
    return "router replica" if ":router" in title else "rest of Ray"


def cpu_by_process() -> dict[int, tuple[str, float]]:
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[process.pid] = (part_of(process), times.user + times.system)
        except psutil.NoSuchProcess:
            pass
    return found


async def measured(work: Any) -> Round:
    before = cpu_by_process()
    started = time.perf_counter()
    tokens = await work
    seconds = time.perf_counter() - started
    spent: dict[str, float] = defaultdict(float)
    for pid, (part, cpu_s) in cpu_by_process().items():
        spent[part] += cpu_s - before.get(pid, (part, 0.0))[1]
    return Round(seconds, tokens, dict(spent))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", choices=ENGINE_ARGS, default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="tsb") as temporary:
        model, engine_args = str(hub.DEMO), ENGINE_ARGS[options.device]
        if options.device == "cuda":
            model = f"{temporary}/model"
            large_model(Path(model))
        ray.init(address="local", namespace="serve", _temp_dir=temporary, include_dashboard=False, log_to_driver=False)
        mesh = {"dp_size": 1, "device_type": options.device}
        args = {"model_id": model, "device_mesh": mesh, "engine_args": engine_args}
        serve.start(http_options={"location": "NoServer"})
        serve.run(build(ServiceArgs.model_validate(args)), name="sampler", route_prefix=None)
        bare, service = await compare(options, Bare(model, options.device, engine_args))
        serve.shutdown()
        ray.shutdown()
    report(options, bare, service)


async def compare(options: argparse.Namespace, engine: Bare) -> tuple[list[Round], list[Round]]:
    sampler = await asyncio.to_thread(twinkle_serve.connect, "sampler")
    template = Template(hub.DEMO)
    rng = random.Random(0)
    bare, service = [], []
    for number in range(options.rounds + 1):
        # New prompts each round, the same for both, so that the prefix cache gives nothing.
        questions = [f"{rng.randint(10, 999)}+{rng.randint(10, 999)}=" for _ in range(options.prompts)]
        prompts = [template.encode([{"role": "user", "content": q}], None, q).tolist() for q in questions]
        work = (prompts, options.samples, options.tokens)
        pair = {}
        # The order alternates too.
        for who in ("bare", "service") if number % 2 else ("service", "bare"):
            pair[who] = await measured(engine.run(*work, number) if who == "bare" else through_service(sampler, *work))
        if number:  # the first round warms both up
            bare.append(pair["bare"])
            service.append(pair["service"])
            print(
                f"round {number}: bare {pair['bare'].tokens_per_s:8,.0f} tokens/s   "
                f"service {pair['service'].tokens_per_s:8,.0f}   "
                f"ratio {pair['service'].tokens_per_s / pair['bare'].tokens_per_s:.3f}",
                flush=True,
            )
    engine.llm.shutdown()
    del engine
    gc.collect()  # vLLM's own finalizer fails when it runs at interpreter exit
    return bare, service


def report(options: argparse.Namespace, bare: list[Round], service: list[Round]) -> None:
    ratios = [s.tokens_per_s / b.tokens_per_s for b, s in zip(bare, service, strict=True)]
    samples = options.prompts * options.samples
    quartiles = statistics.quantiles(ratios, n=4)

    def per_1000(rounds: list[Round], part: str | None) -> float:
        spent = [r.outside_s if part is None else r.cpu_s.get(part, 0.0) for r in rounds]
        return statistics.median(spent) / samples * 1000

    parts = sorted({part for r in service for part in r.cpu_s})
    result = {
        "command": f"scripts/bench overhead --rounds {options.rounds} --prompts {options.prompts} "
        f"--samples {options.samples} --tokens {options.tokens} --device {options.device}",
        "commit": commit(),
        "machine": f"{os.cpu_count()} x {cpu_model()}, {gpu_model() if options.device == 'cuda' else 'no GPU'}",
        "tokens_per_s": {
            "bare": round(statistics.median(r.tokens_per_s for r in bare)),
            "service": round(statistics.median(r.tokens_per_s for r in service)),
        },
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "all": [round(r, 3) for r in ratios],
        },
        "cpu_s_outside_engine_per_1000_samples": {
            "bare": round(per_1000(bare, None), 3),
            "service": round(per_1000(service, None), 3),
        },
        "service_cpu_s_per_1000_samples": {part: round(per_1000(service, part), 3) for part in parts},
        "bare_cpu_s_per_1000_samples": {part: round(per_1000(bare, part), 3) for part in parts},
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def gpu_model() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    uvloop.run(main())  # as Ray runs its actors
