"""How long a batch takes on many engines, by policy: the router's own dispatcher over simulated engines.

    scripts/bench simulate [--engines 8 64 512 4096] [--slots 64] [--waves 16] [--json FILE] [--plot FILE]

An engine runs up to `--slots` sequences side by side; a step gives each one token and takes BASE_S + b * SEQUENCE_S
with b sequences (`--step-s`, by default as measured on the demo model; `--measure` does that again). It hands samples
back DELIVERY_S after they end. Work is `--waves` times what all engines run at once, in groups of
`--samples`.

The lower bound is the larger of two: all tokens at the rate of full engines, and the longest sample alone on one.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import os
import random
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.overhead import commit, cpu_model
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.groups import Group
from twinkle_serve.routing.dispatch import Dispatcher
from twinkle_serve.routing.policies import POLICIES, PolicyName

DELIVERY_S = 0.05
"""`ChunkRunner` waits so long for company."""
PROMPT_TOKENS = 64
LONGEST = 8192

Sample: TypeAlias = tuple[int, int]
"""Its group's id, and its index."""

SHAPES = ("log-normal", "reasoning")


def lengths_of(shape: str, count: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Tokens of samples. log-normal: median 400, sigma 1. reasoning: most are done after hundreds, a quarter think for
    thousands, and one in fifty runs into the limit."""
    if shape == "log-normal":
        drawn = rng.lognormal(np.log(400), 1.0, count)
    else:
        kind = rng.random(count)
        drawn = np.where(kind < 0.75, rng.lognormal(np.log(500), 0.6, count), rng.lognormal(np.log(2500), 0.5, count))
        drawn = np.where(kind > 0.98, LONGEST, drawn)
    return np.clip(drawn, 1, LONGEST).astype(np.int32)


@dataclass(slots=True, eq=False)
class Engine:
    """Sequences that progress together: each has had `progress` minus where it began tokens."""

    name: str
    slots: int
    step_s: tuple[float, float]
    now: float = 0.0
    progress: float = 0.0
    running: list[tuple[float, int, Sample]] = field(default_factory=list)
    """Heap: progress at which a sequence ends, a tie-breaker, its sample."""
    waiting: deque[tuple[int, Sample]] = field(default_factory=deque)
    """Tokens, and which sample it is."""
    version: int = 0
    numbers: Any = field(default_factory=itertools.count)

    def advance(self, now: float) -> None:
        if self.running:
            base, each = self.step_s
            self.progress += (now - self.now) / (base + each * len(self.running))
        self.now = now

    def next_end(self) -> float:
        base, each = self.step_s
        return self.now + max(0.0, self.running[0][0] - self.progress) * (base + each * len(self.running))

    def start(self, delays: list[float]) -> None:
        """Fills free slots."""
        while self.waiting and len(self.running) < self.slots:
            tokens, sample = self.waiting.popleft()
            heapq.heappush(self.running, (self.progress + tokens, next(self.numbers), sample))
            delays.append(self.now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of one batch."""

    makespan_s: float
    bound_s: float
    queueing_mean_s: float
    queueing_p95_s: float
    """Between the call and a sample's first step."""
    cpu_us_per_prompt: float
    """Of the dispatcher and its policy alone."""

    @property
    def ratio(self) -> float:
        return self.makespan_s / self.bound_s


def simulate(
    policy: PolicyName, engines: int, slots: int, lengths: NDArray[np.int32], step_s: tuple[float, float], seed: int
) -> Result:
    """A call with len(lengths) prompts, each of lengths.shape[1] samples."""
    prompts, samples = lengths.shape
    dispatcher = Dispatcher(policy, rng=random.Random(seed))
    made = {f"e{number:04d}": Engine(f"e{number:04d}", slots, step_s) for number in range(engines)}
    for name in made:
        dispatcher.add_engine(name, slots)
    params = SamplingParams(max_tokens=LONGEST)
    rng = np.random.default_rng(seed)
    groups = [
        Group(
            id=i,
            prompt_ids=rng.integers(0, 1000, PROMPT_TOKENS - 1).astype(np.int32),
            params=params,
            count=samples,
            index=i,
            prompts=prompts,
        )
        for i in range(prompts)
    ]
    cpu = 0.0
    delays: list[float] = []
    events: list[tuple[float, int, str, int, list[Sample] | None]] = []
    order = itertools.count()
    last = 0.0

    def send(now: float) -> None:
        nonlocal cpu
        started = time.process_time()
        chunks = dispatcher.assign()
        cpu += time.process_time() - started
        for name, chunk in chunks.items():
            engine = made[name]
            engine.advance(now)
            for group in chunk:
                engine.waiting.extend((int(lengths[group.id, j]), (group.id, j)) for j in group.samples)
            engine.start(delays)
            schedule(engine)

    def schedule(engine: Engine) -> None:
        engine.version += 1
        if engine.running:
            heapq.heappush(events, (engine.next_end(), next(order), engine.name, engine.version, None))

    started = time.process_time()
    dispatcher.enqueue(groups)
    cpu += time.process_time() - started
    send(0.0)
    while events:
        now, _, name, version, delivered = heapq.heappop(events)
        engine = made[name]
        if delivered is not None:
            started = time.process_time()
            dispatcher.ended(name, delivered)
            dispatcher.learn(lengths[tuple(zip(*delivered, strict=True))])
            cpu += time.process_time() - started
            send(now)
            continue
        if version != engine.version:
            continue
        engine.advance(now)
        ended = []
        while engine.running and engine.running[0][0] <= engine.progress + 1e-6:
            _, _, sample = heapq.heappop(engine.running)
            ended.append(sample)
        last = now
        engine.start(delays)
        schedule(engine)
        if ended:
            heapq.heappush(events, (now + DELIVERY_S, next(order), name, 0, ended))
    assert len(delays) == lengths.size, "a sample was lost"
    base, each = step_s
    bound = max(lengths.sum() * (base + each * slots) / slots / engines, lengths.max() * (base + each))
    return Result(
        makespan_s=last,
        bound_s=float(bound),
        queueing_mean_s=float(np.mean(delays)),
        queueing_p95_s=float(np.percentile(delays, 95)),
        cpu_us_per_prompt=cpu / prompts * 1e6,
    )


async def measured_step_s() -> tuple[float, float]:
    """Of a vLLM engine with the demo model on this machine: a line through the steps of 1 and of 64 sequences."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--waves", type=float, default=16)
    parser.add_argument("--step-s", type=float, nargs=2, default=STEP_S, metavar=("BASE_S", "SEQUENCE_S"))
    parser.add_argument("--measure", action="store_true", help="measure the step here first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    step_s = asyncio.run(measured_step_s()) if options.measure else tuple(options.step_s)
    rows = []
    for shape, engines in itertools.product(SHAPES, options.engines):
        prompts = max(1, int(options.waves * engines * options.slots / options.samples))
        rng = np.random.default_rng(engines)
        lengths = lengths_of(shape, prompts * options.samples, rng).reshape(prompts, options.samples)
        for policy in POLICIES:
            result = simulate(policy, engines, options.slots, lengths, step_s, seed=0)
            rows.append(
                {
                    "lengths": shape,
                    "engines": engines,
                    "prompts": prompts,
                    "policy": policy,
                    "makespan_s": round(result.makespan_s, 2),
                    "ratio_to_bound": round(result.ratio, 3),
                    "queueing_mean_s": round(result.queueing_mean_s, 2),
                    "queueing_p95_s": round(result.queueing_p95_s, 2),
                    "cpu_us_per_prompt": round(result.cpu_us_per_prompt, 1),
                    "prompts_per_s": round(prompts / result.makespan_s, 1),
                }
            )
            print(rows[-1], flush=True)
    answer = {
        "command": f"scripts/bench simulate --engines {' '.join(map(str, options.engines))} --slots {options.slots} "
        f"--samples {options.samples} --waves {options.waves:g}" + (" --measure" if options.measure else ""),
        "commit": commit(),
        "machine": f"{os.cpu_count()} x {cpu_model()}, no GPU",
        "step_s": step_s,
        "batches": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


STEP_S = (0.0026, 0.000082)
"""Of the demo model on two cores, float32, by `--measure`."""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Makespan against the bound, by engines, for each policy and shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SHAPES), figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, shape in zip(panels, SHAPES, strict=True):
        for policy in POLICIES:
            mine = [row for row in rows if row["lengths"] == shape and row["policy"] == policy]
            panel.plot([r["engines"] for r in mine], [r["ratio_to_bound"] for r in mine], marker="o", label=policy)
        panel.set(xscale="log", xlabel="engines", title=f"{shape} lengths")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="makespan / lower bound")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
