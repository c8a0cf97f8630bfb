"""How soon samples come from new weights, how updates affect running samples, and their cost in memory.

    scripts/bench weights [--rounds 10] [--ranks 8 16 32 64] [--versions 200] [--only adapters | base] [--json FILE]

Times an adapter from tensors in this process to its first sampled token: through the service, which stores, checks and
publishes it, and in turn through the bare engine, which loads the same files from memory. Both engines stay up with the
same arguments; one works while the other idles.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray._private.internal_api import memory_summary

from benchmarks import base_weights
from benchmarks.overhead import commit, cpu_model
from twinkle_serve import hub
from twinkle_serve.adapters import CONFIG, WEIGHTS, pack_adapter
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.engines.vllm import cpu_defaults

ENGINE_ARGS = {
    "max_model_len": 256,
    "dtype": "float32",
    "kv_cache_memory_bytes": 2**28,
    "enable_lora": True,
    "max_lora_rank": 64,
}
PROMPT = [20, 21, 22, 23]
MEMORY = Path("/dev/shm")


class Adapters:
    """LoRA adapters of the demo model with new random weights each time, as tensors, as a trainer has them."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        self._model = AutoModelForCausalLM.from_pretrained(hub.DEMO, dtype=torch.float32)
        self._by_rank: dict[int, tuple[Any, dict[str, Any]]] = {}

    def new(self, rank: int) -> tuple[Any, dict[str, Any]]:
        """Returns peft's config, and tensors by name."""
        import torch
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

        if rank not in self._by_rank:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
            peft = get_peft_model(self._model, config)
            self._by_rank[rank] = (peft.peft_config["default"], get_peft_model_state_dict(peft))
            self._model = peft.unload()
        config, tensors = self._by_rank[rank]
        return config, {name: torch.randn_like(tensor) * 0.05 for name, tensor in tensors.items()}


class Bare:
    """AsyncLLM in this process, which loads adapters from directories."""

    def __init__(self, directory: Path) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self._directory = directory
        self._loads = 0
        args = {**ENGINE_ARGS, "max_loras": 2}  # as many slots as the service's engine has
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=str(hub.DEMO), disable_log_stats=True, **cpu_defaults(str(hub.DEMO), args, 1))
        )

    def written(self, files: AdapterFiles) -> str:
        """Writes the files to a new directory in memory and returns it."""
        self._loads += 1
        path = self._directory / str(self._loads)
        path.mkdir()
        (path / CONFIG).write_bytes(files.config)
        (path / WEIGHTS).write_bytes(files.weights)
        return str(path)

    async def load_and_sample(self, path: str) -> None:
        from vllm.inputs import tokens_input
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import SamplingParams

        request = LoRARequest(f"bench{self._loads}", self._loads, path)
        await self.llm.add_lora(request)
        params = SamplingParams(max_tokens=1, detokenize=False)
        async for _ in self.llm.generate(tokens_input(PROMPT), params, f"first-{self._loads}", lora_request=request):
            pass


def part_of(process: psutil.Process) -> str | None:
    title = " ".join(process.cmdline())
    for part in ("store", "router", "engine-dp0"):
        if f"ServeReplica:sampler:{part}" in title:
            return part
    return "vllm" if title.startswith("VLLM") else None


def memory_mib(service: list[psutil.Process]) -> dict[str, float]:
    """Memory of the service's processes without shared pages, of files in memory, and of Ray's object store."""
    found: dict[str, float] = defaultdict(float)
    for process in service:
        full = process.memory_full_info()
        found[part_of(process) or "other"] += full.uss / 2**20
    files = sum(path.stat().st_size for path in MEMORY.glob("twinkle-serve-*/**/*") if path.is_file())
    objects = memory_summary(stats_only=True)
    used = next(line for line in objects.splitlines() if "Plasma memory usage" in line)
    return {**found, "files": files / 2**20, "object store": float(used.split()[3])}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--versions", type=int, default=200)
    parser.add_argument("--only", choices=["adapters", "base"], help="leave the other half out")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="tsb") as temporary,
        tempfile.TemporaryDirectory(prefix="bench-weights-", dir=MEMORY) as memory,
    ):
        ray.init(address="local", namespace="serve", _temp_dir=temporary, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"location": "NoServer"})
        result = {
            "command": f"scripts/bench weights --rounds {options.rounds} --ranks {' '.join(map(str, options.ranks))} "
            f"--versions {options.versions}" + (f" --only {options.only}" if options.only else ""),
            "commit": commit(),
            "machine": f"{os.cpu_count()} x {cpu_model()}, no GPU",
        }
        if options.only != "base":
            result["adapters"] = await measure(options, Path(memory))
        if options.only != "adapters":
            result["base"] = await base_weights.first_sample(options, Path(memory), part_of)
        serve.shutdown()
        ray.shutdown()
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


async def measure(options: argparse.Namespace, memory: Path) -> dict[str, Any]:
    sampler = await asyncio.to_thread(base_weights.service_of, "demo", ENGINE_ARGS)
    service = base_weights.processes(part_of)
    adapters, bare = Adapters(), Bare(memory)
    ranks = {}
    for rank in options.ranks:
        ranks[f"rank {rank}"] = await publish(options.rounds, rank, adapters, bare, sampler)
        print(f"rank {rank}: {ranks[f'rank {rank}']}", flush=True)
    bare.llm.shutdown()
    del bare
    gc.collect()  # vLLM's own finalizer fails when it runs at interpreter exit
    memory_mib = await many(options.versions, adapters, sampler, service)
    await asyncio.to_thread(sampler.shutdown)
    return {"first_sample_ms": ranks, "memory_mib": memory_mib}


async def publish(rounds: int, rank: int, adapters: Adapters, bare: Bare, sampler: Any) -> dict[str, Any]:
    """Returns milliseconds from tensors to their first token."""
    times: dict[str, list[float]] = defaultdict(list)
    size_bytes = 0
    for number in range(rounds + 1):
        config, tensors = adapters.new(rank)
        files = pack_adapter(config, tensors)
        size_bytes = len(files.weights)
        for who in ("bare", "service") if number % 2 else ("service", "bare"):
            path = bare.written(files) if who == "bare" else ""
            started = time.perf_counter()
            if who == "bare":
                await bare.load_and_sample(path)
            else:
                await asyncio.to_thread(sampler.add_adapter_to_model, "bench", config, state_dict=tensors)
                published = time.perf_counter()
                response = await sampler.sample_async({"input_ids": PROMPT}, {"max_tokens": 1}, "bench")
                assert response.sequences[0].adapter.startswith("bench@")
                times["publish"].append((published - started) * 1000)
            times[who].append((time.perf_counter() - started) * 1000)
    steady = {who: values[1:] for who, values in times.items()}  # the first round warms both up
    ratios = [a / b for a, b in zip(steady["service"], steady["bare"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "bytes": size_bytes,
        **{who: round(statistics.median(values), 1) for who, values in steady.items()},
        "ratio": {"median": round(statistics.median(ratios), 2), "quartiles": [round(quartiles[i], 2) for i in (0, 2)]},
    }


async def many(versions: int, adapters: Adapters, sampler: Any, service: list[psutil.Process]) -> dict[str, Any]:
    """Memory after many versions, each sampled from once."""
    at = {}
    for number in range(1, versions + 1):
        config, tensors = adapters.new(64)
        await asyncio.to_thread(sampler.add_adapter_to_model, "bench", config, state_dict=tensors)
        await sampler.sample_async({"input_ids": PROMPT}, {"max_tokens": 1}, "bench")
        if number in (versions // 10, versions // 2, versions):
            at[f"after {number} versions"] = {part: round(mib, 1) for part, mib in memory_mib(service).items()}
            print(f"after {number} versions: {at[f'after {number} versions']}", flush=True)
    return at


if __name__ == "__main__":
    asyncio.run(main())
