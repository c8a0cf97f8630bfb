"""The half of `scripts/bench weights` that updates the model's own weights."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ray import serve

import twinkle_serve
from graphs.sampler import build
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.engines.vllm import cpu_defaults

PROMPT = [20, 21, 22, 23]
STREAM_TOKENS = (80, 120, 160, 200)
"""Sample length of each caller; they differ so that samples end at different times."""
MIB = 2**20


def service_of(model: str, engine_args: dict[str, Any]) -> Any:
    """Deploys the service with one engine, under the name that `part_of` looks for."""
    args = {"model_id": model, "device_mesh": {"dp_size": 1, "device_type": "cpu"}, "engine_args": engine_args}
    serve.run(build(ServiceArgs.model_validate(args)), name="sampler", route_prefix=None)
    return twinkle_serve.connect("sampler")


def processes(part_of: Callable[[psutil.Process], str | None]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if part_of(process):
                found.append(process)
    return found


def noisy(weights: dict[str, Any]) -> dict[str, Any]:
    """Returns new weights of the same model."""
    import torch

    return {name: tensor + 0.01 * torch.randn_like(tensor) * tensor.std() for name, tensor in weights.items()}


def large_model(directory: Path) -> dict[str, Any]:
    """Saves a random model of 0.9 GB in float32 to a directory. Returns its weights."""
    import shutil

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=13,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (hub.DEMO / name).exists():
            shutil.copy(hub.DEMO / name, directory)
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


class Bare:
    """AsyncLLM in this process, which reloads a model's weights from a directory."""

    def __init__(self, model: str, engine_args: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=model, disable_log_stats=True, **cpu_defaults(model, engine_args, 1))
        )
        self._loads = 0

    async def load_and_sample(self, path: Path) -> None:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import SamplingParams

        self._loads += 1
        await self.llm.pause_generation(mode="keep")
        await self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        await self.llm.resume_generation()
        params = SamplingParams(max_tokens=1, detokenize=False)
        async for _ in self.llm.generate(tokens_input(PROMPT), params, f"first-{self._loads}"):
            pass


class Peak(threading.Thread):
    """Peak memory of each part of the service, beyond its memory at the beginning."""

    def __init__(self, service: list[psutil.Process], part_of: Callable[[psutil.Process], str | None]) -> None:
        super().__init__(daemon=True)
        self._watched = [(part_of(process) or "other", process) for process in [*service, psutil.Process()]]
        self._at_first = self._now()
        self.mib: dict[str, float] = defaultdict(float)
        self._end = threading.Event()

    def _now(self) -> list[float]:
        return [process.memory_full_info().uss / MIB for _, process in self._watched]

    def run(self) -> None:
        while not self._end.wait(0.02):
            for (part, _), first, now in zip(self._watched, self._at_first, self._now(), strict=True):
                self.mib["caller" if part == "other" else part] = max(
                    self.mib["caller" if part == "other" else part], now - first
                )

    def stop(self) -> dict[str, float]:
        self._end.set()
        self.join()
        return {part: round(mib, 1) for part, mib in self.mib.items()}


def memcpy_gb_s(size_bytes: int) -> float:
    """Copy rate of one thread, memory to memory, best of five."""
    source, target = np.ones(size_bytes, np.uint8), np.zeros(size_bytes, np.uint8)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return size_bytes / min(times) / 1e9


async def first_sample(
    options: argparse.Namespace, directory: Path, part_of: Callable[[psutil.Process], str | None]
) -> dict[str, Any]:
    """Measures from tensors to their first token, with the demo model and a model of 0.9 GB. The bare engine beside it
    loads the same weights from files in memory."""
    from safetensors.torch import load_file, save_file

    found: dict[str, Any] = {}
    for which in ("demo", "0.9 GB"):
        path = hub.DEMO if which == "demo" else directory / "large"
        weights = load_file(path / "model.safetensors") if which == "demo" else large_model(path)
        engine_args = {"max_model_len": 256, "dtype": "float32", "kv_cache_memory_bytes": 2**27}
        sampler = await asyncio.to_thread(service_of, str(path), engine_args)
        service, bare = processes(part_of), Bare(str(path), engine_args)
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        times: dict[str, list[float]] = defaultdict(list)
        rounds = options.rounds if which == "demo" else 4

        for number in range(rounds + 1):
            fresh = noisy(weights)
            for who in ("bare", "service") if number % 2 else ("service", "bare"):
                if who == "service":
                    updated_s, sampled_s = await update_and_sample(sampler, f"{which}-{number}", fresh)
                    times["update"].append(updated_s)
                    times["service"].append(sampled_s)
                    continue
                there = directory / f"bare-{which[0]}"
                there.mkdir(exist_ok=True)
                save_file(fresh, there / "model.safetensors")
                (there / "config.json").write_text((path / "config.json").read_text())
                started = time.perf_counter()
                await bare.load_and_sample(there)
                times["bare"].append(time.perf_counter() - started)
        steady = {who: values[1:] for who, values in times.items()}
        ratios = [a / b for a, b in zip(steady["service"], steady["bare"], strict=True)]
        found[which] = {
            "bytes": size_bytes,
            **{f"{who}_s": round(statistics.median(values), 3) for who, values in steady.items()},
            "ratio": {"median": round(statistics.median(ratios), 2), "least": round(min(ratios), 2)},
            "update_gb_s": round(size_bytes / statistics.median(steady["update"]) / 1e9, 3),
            "memcpy_gb_s": round(memcpy_gb_s(min(size_bytes, 2**28)), 2),
        }
        print(f"{which}: {found[which]}", flush=True)
        bare.llm.shutdown()
        del bare
        gc.collect()  # vLLM's own finalizer fails when it runs at interpreter exit
        if which != "demo":
            # Apart from the timed rounds: polling memory this often takes a good part of a core.
            found["peak_memory_mib"] = {}
            for bucket_mib in (64, 256):
                peak = Peak(service, part_of)
                peak.start()
                await update_and_sample(sampler, f"peak-{bucket_mib}", noisy(weights), bucket_mib)
                found["peak_memory_mib"][f"buckets of {bucket_mib} MiB"] = peak.stop()
            print(f"peak memory: {found['peak_memory_mib']}", flush=True)
        if which == "demo":
            found["longest_gap_ms"] = await asyncio.to_thread(gaps, sampler, weights, options.rounds)
            found["memory_mib"] = await many(options.versions, sampler, weights, service)
        await asyncio.to_thread(sampler.shutdown)
    return found


async def update_and_sample(
    sampler: Any, label: str, weights: dict[str, Any], bucket_mib: int = 256
) -> tuple[float, float]:
    """Returns seconds until the version was current, and until its first token arrived."""
    started = time.perf_counter()
    await asyncio.to_thread(sampler.update_weights, weights, label, bucket_bytes=bucket_mib * MIB)
    updated_s = time.perf_counter() - started
    response = await sampler.sample_async({"input_ids": PROMPT}, {"max_tokens": 1})
    assert response.sequences[0].weight_versions[0].version == label
    return updated_s, time.perf_counter() - started


def gaps(sampler: Any, weights: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Longest wait for the next piece of text around an update, for callers that stream sample after sample."""
    found: dict[str, Any] = {}
    for mode in ("no update", "keep", "wait", "abort"):
        longest = []
        for number in range(rounds):
            with streaming(sampler) as waits:
                time.sleep(0.3)  # streams run, so that the update falls into their middle
                if mode != "no update":
                    sampler.update_weights(noisy(weights), f"gap-{mode}-{number}", mode=mode)
                time.sleep(0.3)
            longest.append(max(waits) * 1000)
        quartiles = statistics.quantiles(longest, n=4)
        found[mode] = {
            "median": round(statistics.median(longest), 1),
            "quartiles": [round(quartiles[i], 1) for i in (0, 2)],
        }
        print(f"longest gap, {mode}: {found[mode]} ms", flush=True)
    return found


@contextlib.contextmanager
def streaming(sampler: Any) -> Iterator[list[float]]:
    """Runs a streaming caller per entry of STREAM_TOKENS. The list collects seconds between pieces of text, across
    samples too."""
    waits: list[float] = []
    end = threading.Event()

    def run(tokens: int) -> None:
        last = None
        while not end.is_set():
            for _ in sampler.sample_stream({"input_ids": PROMPT}, {"max_tokens": tokens, "ignore_eos": True}):
                now = time.perf_counter()
                if last is not None:
                    waits.append(now - last)
                last = now
                if end.is_set():
                    break

    threads = [threading.Thread(target=run, args=(tokens,)) for tokens in STREAM_TOKENS]
    for thread in threads:
        thread.start()
    try:
        yield waits
    finally:
        end.set()
        for thread in threads:
            thread.join()


async def many(versions: int, sampler: Any, weights: dict[str, Any], service: list[psutil.Process]) -> dict[str, Any]:
    """Memory after many versions, each sampled from once."""
    from benchmarks.weights import memory_mib

    at = {}
    for number in range(1, versions + 1):
        await asyncio.to_thread(sampler.update_weights, noisy(weights), f"many-{number}")
        await sampler.sample_async({"input_ids": PROMPT}, {"max_tokens": 1})
        if number in (versions // 10, versions // 2, versions):
            at[f"after {number} versions"] = {part: round(mib, 1) for part, mib in memory_mib(service).items()}
            print(f"after {number} versions: {at[f'after {number} versions']}", flush=True)
    return at
