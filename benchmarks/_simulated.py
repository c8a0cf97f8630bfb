"""Simulated engines under the router's own dispatcher. No router, no RPC, no tokens: time is computed."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.groups import Group
from twinkle_serve.engines.group_runner import FLUSH_SHARE, MAX_FLUSH_S, MIN_FLUSH_S
from twinkle_serve.routing.dispatch import Dispatcher
from twinkle_serve.routing.policies import PolicyName

DELIVERY_S = 0.003
"""From an engine's hand-over of samples to their arrival at the router."""
PROMPT_TOKENS = 64
LONGEST = 8192

Sample: TypeAlias = tuple[int, int]
"""(group id, index of the sample)."""

SHAPES = ("log-normal", "reasoning")


def lengths_of(shape: str, count: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Draws sample lengths, in tokens.

    log-normal: median 400, sigma 1. reasoning: most end after hundreds, a quarter after thousands, and one in fifty
    hits the limit.
    """
    if shape == "log-normal":
        drawn = rng.lognormal(np.log(400), 1.0, count)
    else:
        kind = rng.random(count)
        drawn = np.where(kind < 0.75, rng.lognormal(np.log(500), 0.6, count), rng.lognormal(np.log(2500), 0.5, count))
        drawn = np.where(kind > 0.98, LONGEST, drawn)
    return np.clip(drawn, 1, LONGEST).astype(np.int32)


@dataclass(slots=True, eq=False)
class Engine:
    """Sequences that advance together: each has `progress` minus its starting progress tokens."""

    name: str
    slots: int
    step_s: tuple[float, float]
    now: float = 0.0
    progress: float = 0.0
    running: list[tuple[float, int, Sample]] = field(default_factory=list)
    """Heap of (progress at which a sequence ends, tie-breaker, sample)."""
    waiting: deque[tuple[int, Sample]] = field(default_factory=deque)
    """(tokens, sample)."""
    version: int = 0
    numbers: Any = field(default_factory=itertools.count)
    ended: list[Sample] = field(default_factory=list)
    """Finished samples that are not handed back yet."""
    due: float = math.inf
    """Time at which they are handed back."""

    def advance(self, now: float) -> None:
        if self.running:
            base, each = self.step_s
            self.progress += (now - self.now) / (base + each * len(self.running))
        self.now = now

    def next_end(self) -> float:
        base, each = self.step_s
        return self.now + max(0.0, self.running[0][0] - self.progress) * (base + each * len(self.running))

    def start(self, delays: list[float]) -> None:
        """Fills free slots from the queue, and records the time of each start."""
        while self.waiting and len(self.running) < self.slots:
            tokens, sample = self.waiting.popleft()
            heapq.heappush(self.running, (self.progress + tokens, next(self.numbers), sample))
            delays.append(self.now)

    def take_ended(self) -> list[Sample]:
        """Removes and returns the samples that have all their tokens."""
        ended = []
        while self.running and self.running[0][0] <= self.progress + 1e-6:
            ended.append(heapq.heappop(self.running)[2])
        return ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Figures of one batch."""

    makespan_s: float
    delays_s: list[float]
    """Seconds from the call to the first step, per sample."""
    cpu_us_per_prompt: float
    """CPU of the dispatcher and its policy alone."""
    chunks: int
    """Chunks that the router sent."""
    items: int
    """Items that engines handed back."""


def simulate(
    policy: PolicyName, engines: int, slots: int, lengths: NDArray[np.int32], step_s: tuple[float, float], seed: int
) -> Result:
    """Simulates one call. `lengths` has shape [prompts, samples]."""
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
    events: list[tuple[float, int, str, int | None]] = []
    """(time, tie-breaker, engine, engine version whose step ends; None for a delivery)."""
    order = itertools.count()
    chunk_left: list[int] = []
    """Unfinished samples of each chunk."""
    sent: dict[Sample, tuple[int, float]] = {}
    """Chunk and send time of each sample."""
    items = 0
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
                sent.update(((group.id, j), (len(chunk_left), now)) for j in group.samples)
            chunk_left.append(sum(group.count for group in chunk))
            engine.start(delays)
            schedule(engine)

    def schedule(engine: Engine) -> None:
        engine.version += 1
        if engine.running:
            heapq.heappush(events, (engine.next_end(), next(order), engine.name, engine.version))

    def hand_back(engine: Engine, ended: list[Sample], now: float) -> None:
        """Schedules the delivery, as `GroupRunner` does."""
        due = engine.due
        for sample in ended:
            chunk, since = sent.pop(sample)
            chunk_left[chunk] -= 1
            wait_s = min(max(MIN_FLUSH_S, FLUSH_SHARE * (now - since)), MAX_FLUSH_S) if chunk_left[chunk] else 0.0
            due = min(due, now + wait_s)
        engine.ended += ended
        if due < engine.due:
            engine.due = due
            heapq.heappush(events, (due + DELIVERY_S, next(order), engine.name, None))

    started = time.process_time()
    dispatcher.enqueue(groups)
    cpu += time.process_time() - started
    send(0.0)
    while events:
        now, _, name, version = heapq.heappop(events)
        engine = made[name]
        if version is None:
            if now < engine.due + DELIVERY_S:
                continue
            delivered, engine.ended, engine.due = engine.ended, [], math.inf
            items += 1
            started = time.process_time()
            dispatcher.ended(name, delivered)
            dispatcher.learn(lengths[tuple(zip(*delivered, strict=True))])
            cpu += time.process_time() - started
            send(now)
            continue
        if version != engine.version:
            continue
        engine.advance(now)
        ended = engine.take_ended()
        last = now
        engine.start(delays)
        schedule(engine)
        if ended:
            hand_back(engine, ended, now)
    assert len(delays) == lengths.size, "a sample was lost"
    return Result(
        makespan_s=last,
        delays_s=delays,
        cpu_us_per_prompt=cpu / prompts * 1e6,
        chunks=len(chunk_left),
        items=items,
    )


def bound_s(lengths: NDArray[np.int32], engines: int, slots: int, step_s: tuple[float, float]) -> float:
    """Lower bound on the makespan: all tokens at the rate of full engines, or the longest sample alone on one."""
    base, each = step_s
    return float(max(lengths.sum() * (base + each * slots) / slots / engines, lengths.max() * (base + each)))


def pooled(
    engines: int, slots: int, lengths: NDArray[np.int32], step_s: tuple[float, float]
) -> tuple[float, list[float]]:
    """Simulates the same work without placement. Returns the makespan, s, and the start time of each sample.

    All samples wait in one queue, in the order of their groups. A free slot takes the next one at once: nothing is
    delivered late, nothing is sent ahead, and a group need not stay together. A started sample stays on its engine,
    whose steps take as long as above; lengths are unknown in advance. No router that knows no lengths and moves no
    running samples can be counted on to do better.
    """
    waiting = deque((int(tokens), (i, 0)) for i, tokens in enumerate(lengths.ravel()))
    # The first samples are dealt out one by one, so that engines are evenly loaded where samples are fewer than slots.
    first = [[waiting.popleft() for _ in range(min(engines, len(waiting)))] for _ in range(slots)]
    delays: list[float] = []
    made = []
    for number in range(engines):
        engine = Engine(str(number), slots, step_s)
        engine.waiting.extend(row[number] for row in first if number < len(row))
        engine.start(delays)
        engine.waiting = waiting
        made.append(engine)
    ends = [(engine.next_end(), number) for number, engine in enumerate(made) if engine.running]
    heapq.heapify(ends)
    now = 0.0
    while ends:
        now, number = heapq.heappop(ends)
        engine = made[number]
        engine.advance(now)
        engine.take_ended()
        engine.start(delays)
        if engine.running:
            heapq.heappush(ends, (engine.next_end(), number))
    return now, delays
