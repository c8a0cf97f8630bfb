"""A model's own weights: from tensors to their first token, gaps in streams, and memory."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from benchmarks.common.engines import AsyncLLM, first_token
from benchmarks.common.models import Tensors, noisy, sparsely_changed
from benchmarks.common.report import Figures, quartiles
from benchmarks.weights.memory import MIB, PeakMemory, Processes, checkpoints, memcpy_gb_s, memory_mib
from twinkle_serve.sampler import RunningSampler

PROMPT = [20, 21, 22, 23]
STREAM_TOKENS = (80, 120, 160, 200)
"""Sample length of each caller; they differ so that samples end at different times."""
MODES: tuple[Literal["keep", "wait", "abort"], ...] = ("keep", "wait", "abort")


CHANGED = 0.03
"""Share of the blocks that change between deltas."""
STANDSTILL = ("pause", "load", "commit")
"""Phases of an update during which samples wait."""


class Bare:
    """A bare engine that reloads its model's weights from directories."""

    def __init__(self, llm: AsyncLLM, model: Path, directory: Path) -> None:
        self._llm, self._model, self._directory = llm, model, directory
        self._loads = 0

    def write(self, number: int, weights: Tensors) -> None:
        """Writes weights to a file in memory, for `load_and_sample`."""
        path = self._path(number)
        path.mkdir(exist_ok=True)
        shutil.copy(self._model / "config.json", path)
        save_file(weights, path / "model.safetensors")

    def _path(self, number: int) -> Path:
        return self._directory / f"reloaded-{number}"

    async def load_and_sample(self, number: int) -> float:
        """Returns the seconds during which samples would wait."""
        self._loads += 1
        started = time.perf_counter()
        await self._llm.pause_generation(mode="keep")
        await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self._path(number))})
        await self._llm.resume_generation()
        stood_s = time.perf_counter() - started
        await first_token(self._llm, PROMPT, f"model-{self._loads}")
        return stood_s


async def first_sample(rounds: int, name: str, weights: Tensors, bare: Bare, sampler: RunningSampler) -> Figures:
    """Returns seconds from tensors to their first token."""
    times: dict[str, list[float]] = defaultdict(list)
    # Made before: memory that is freed just before an update makes new pages dear on virtual machines.
    made = [noisy(weights) for _ in range(3)]
    for index, tensors in enumerate(made):
        bare.write(index, tensors)
    for number in range(rounds + 1):
        index = number % len(made)
        for way in ("bare", "service") if number % 2 else ("service", "bare"):
            if way == "service":
                for figure, seconds in (await _update_and_sample(sampler, f"{name}-{number}", made[index])).items():
                    times[figure].append(seconds)
            else:
                started = time.perf_counter()
                times["bare_standstill"].append(await bare.load_and_sample(index))
                times["bare"].append(time.perf_counter() - started)
    steady = {way: values[1:] for way, values in times.items()}  # the first round warms both up
    ratios, standing = (
        [a / b for a, b in zip(steady[own], steady[other], strict=True)]
        for own, other in (("service", "bare"), ("standstill", "bare_standstill"))
    )
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    figures = {
        "bytes": size_bytes,
        **{f"{way}_s": round(statistics.median(values), 3) for way, values in steady.items()},
        "first_token_ratio": quartiles(ratios, 2),
        "standstill_ratio": quartiles(standing, 2),
        "transport_gb_s": round(size_bytes / statistics.median(steady["transport"]) / 1e9, 2),
        "update_gb_s": round(size_bytes / statistics.median(steady["update"]) / 1e9, 3),
        "memcpy_gb_s": round(memcpy_gb_s(min(size_bytes, 2**28)), 2),
    }
    print(f"{name}: {figures}", flush=True)
    return figures


async def deltas(rounds: int, name: str, weights: Tensors, sampler: RunningSampler) -> Figures:
    """Updates of which CHANGED of the blocks differ from the last one, sent whole and as deltas in turn."""
    times: dict[str, dict[str, list[float]]] = {"whole": defaultdict(list), "delta": defaultdict(list)}
    current = noisy(weights)
    await _update_and_sample(sampler, f"{name}-delta-base", current, delta=True)
    for number in range(rounds + 1):
        for way in ("whole", "delta"):
            sent = sparsely_changed(current, CHANGED)
            current = sent if way == "delta" else current
            label = f"{name}-{way}-{number}"
            found = await _update_and_sample(sampler, label, sent, delta=way == "delta")
            if number:  # the first round warms both up
                for figure, seconds in found.items():
                    times[way][figure].append(seconds)
    figures: Figures = {
        way: {f"{figure}_s": round(statistics.median(values), 3) for figure, values in found.items()}
        for way, found in times.items()
    }
    for figure, ratio in (("service", "first_token_ratio"), ("transport", "transport_ratio")):
        pairs = zip(times["delta"][figure], times["whole"][figure], strict=True)
        figures[ratio] = quartiles([delta / whole for delta, whole in pairs], 2)
    print(f"{name}, {CHANGED:.0%} of blocks changed: {figures}", flush=True)
    return figures


async def _phases(sampler: RunningSampler, label: str) -> dict[str, float]:
    """Returns the seconds of each phase of an update, as the router measured them, once it is on the disk."""
    while True:
        for event in reversed(sampler.telemetry()["events"]):
            if event["kind"] == "weights" and event["text"].startswith(f"{label} is current"):
                return {phase: float(seconds) for phase, seconds in re.findall(r"(\w+) ([\d.]+) s\b", event["text"])}
        await asyncio.sleep(0.05)


async def peak_memory(sampler: RunningSampler, weights: Tensors, service: Processes) -> dict[str, dict[str, float]]:
    """Peak memory of an update, for two sizes of buckets, and where it returns before the disk has it."""
    peaks = {}
    for bucket_mib, durable in ((64, True), (256, True), (256, False)):
        made = noisy(weights)
        peak = PeakMemory(service)
        peak.start()
        label = f"peak-{bucket_mib}-{durable}"
        await _update_and_sample(sampler, label, made, bucket_mib, durable=durable)
        peaks[f"buckets of {bucket_mib} MiB" + ("" if durable else ", durable=False")] = peak.stop()
    print(f"peak memory: {peaks}", flush=True)
    return peaks


async def _update_and_sample(
    sampler: RunningSampler,
    label: str,
    weights: Tensors,
    bucket_mib: int = 256,
    *,
    delta: bool = False,
    durable: bool = False,
) -> dict[str, float]:
    """Returns the seconds of an update: until it was current (update), until its first token (service), of each phase,
    of the phases during which samples wait (standstill), and of the rest before them (transport)."""
    started = time.perf_counter()
    await asyncio.to_thread(
        sampler.update_weights, weights, label, bucket_bytes=bucket_mib * MIB, durable=durable, delta=delta
    )
    updated_s = time.perf_counter() - started
    response = await sampler.sample_async({"input_ids": PROMPT}, {"max_tokens": 1})
    assert response.sequences[0].weight_versions[0].version == label
    sampled_s = time.perf_counter() - started
    phases = await asyncio.wait_for(_phases(sampler, label), 600)
    standstill_s = sum(phases[phase] for phase in STANDSTILL)
    return {
        "update": updated_s,
        "service": sampled_s,
        **phases,
        "standstill": standstill_s,
        "transport": updated_s - standstill_s,
    }


def gaps(sampler: RunningSampler, weights: Tensors, rounds: int) -> Figures:
    """Longest wait for the next piece of text around an update, for callers that stream sample after sample."""
    found: Figures = {}
    for mode in (None, *MODES):
        longest = []
        for number in range(rounds):
            with _streaming(sampler) as waits:
                time.sleep(0.3)  # streams run, so that the update falls into their middle
                if mode is not None:
                    sampler.update_weights(noisy(weights), f"gap-{mode}-{number}", mode=mode)
                time.sleep(0.3)
            longest.append(max(waits) * 1000)
        found[mode or "no update"] = quartiles(longest, 1)
        print(f"longest gap, {mode or 'no update'}: {found[mode or 'no update']} ms", flush=True)
    return found


@contextlib.contextmanager
def _streaming(sampler: RunningSampler) -> Iterator[list[float]]:
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


async def memory_of_versions(
    versions: int, sampler: RunningSampler, weights: Tensors, service: Processes
) -> dict[str, dict[str, float]]:
    """Memory after many versions, each sampled from once."""
    at = {}
    for number in range(1, versions + 1):
        await asyncio.to_thread(sampler.update_weights, noisy(weights), f"many-{number}")
        await sampler.sample_async({"input_ids": PROMPT}, {"max_tokens": 1})
        if number in checkpoints(versions):
            at[f"after {number} versions"] = memory_mib(service)
            print(f"after {number} versions: {at[f'after {number} versions']}", flush=True)
    return at
