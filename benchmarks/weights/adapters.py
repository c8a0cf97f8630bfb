"""Adapters: from tensors to their first token, and memory after many versions."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.common.engines import AsyncLLM, first_token
from benchmarks.common.models import Tensors
from benchmarks.common.report import Figures, quartiles
from benchmarks.weights.memory import Processes, checkpoints, memory_mib
from twinkle_serve.adapters import CONFIG, WEIGHTS, pack_adapter
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.sampler import RunningSampler

PROMPT = [20, 21, 22, 23]
LARGEST_RANK = 64


class Adapters:
    """LoRA adapters of a model with new random weights each time, as tensors, as a trainer has them."""

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._by_rank: dict[int, tuple[Any, Tensors]] = {}

    def new(self, rank: int) -> tuple[Any, Tensors]:
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
    """A bare engine that loads adapters from directories."""

    def __init__(self, llm: AsyncLLM, directory: Path) -> None:
        self._llm, self._directory = llm, directory
        self._loads = 0

    def written(self, files: AdapterFiles) -> str:
        """Writes the files to a new directory in memory and returns it."""
        self._loads += 1
        path = self._directory / f"adapter-{self._loads}"
        path.mkdir()
        (path / CONFIG).write_bytes(files.config)
        (path / WEIGHTS).write_bytes(files.weights)
        return str(path)

    async def load_and_sample(self, path: str) -> None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(f"bench{self._loads}", self._loads, path)
        await self._llm.add_lora(request)
        await first_token(self._llm, PROMPT, f"adapter-{self._loads}", request)


async def first_sample(rounds: int, rank: int, adapters: Adapters, bare: Bare, sampler: RunningSampler) -> Figures:
    """Returns milliseconds from tensors to their first token."""
    times: dict[str, list[float]] = defaultdict(list)
    size_bytes = 0
    for number in range(rounds + 1):
        config, tensors = adapters.new(rank)
        files = pack_adapter(config, tensors)
        size_bytes = len(files.weights)
        for way in ("bare", "service") if number % 2 else ("service", "bare"):
            path = bare.written(files) if way == "bare" else ""
            started = time.perf_counter()
            if way == "bare":
                await bare.load_and_sample(path)
            else:
                await asyncio.to_thread(sampler.add_adapter_to_model, "bench", config, state_dict=tensors)
                published = time.perf_counter()
                response = await sampler.sample_async({"input_ids": PROMPT}, {"max_tokens": 1}, "bench")
                assert response.sequences[0].adapter.startswith("bench@")
                times["publish"].append((published - started) * 1000)
            times[way].append((time.perf_counter() - started) * 1000)
    steady = {way: values[1:] for way, values in times.items()}  # the first round warms both up
    ratios = [a / b for a, b in zip(steady["service"], steady["bare"], strict=True)]
    figures = {
        "bytes": size_bytes,
        **{way: round(statistics.median(values), 1) for way, values in steady.items()},
        "ratio": quartiles(ratios, 2),
    }
    print(f"adapter of rank {rank}: {figures}", flush=True)
    return figures


async def memory_of_versions(
    versions: int, adapters: Adapters, sampler: RunningSampler, service: Processes
) -> dict[str, dict[str, float]]:
    """Memory after many versions, each sampled from once."""
    at = {}
    for number in range(1, versions + 1):
        config, tensors = adapters.new(LARGEST_RANK)
        await asyncio.to_thread(sampler.add_adapter_to_model, "bench", config, state_dict=tensors)
        await sampler.sample_async({"input_ids": PROMPT}, {"max_tokens": 1}, "bench")
        if number in checkpoints(versions):
            at[f"after {number} versions"] = memory_mib(service)
            print(f"after {number} versions: {at[f'after {number} versions']}", flush=True)
    return at
