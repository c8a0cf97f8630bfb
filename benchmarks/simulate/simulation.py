"""The router's own dispatcher over simulated engines. No router, no RPC, no tokens: time is computed."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulate.engine import Engine, Sample
from benchmarks.simulate.lengths import LONGEST
from benchmarks.simulate.policies import PolicyName, build_policy
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.group_runner import FLUSH_SHARE, MAX_FLUSH_S, MIN_FLUSH_S
from twinkle_serve.routing.dispatch import Dispatcher
from twinkle_serve.routing.groups import RoutedGroup

DELIVERY_S = 0.003
"""From an engine's hand-over of samples to their arrival at the router."""
PROMPT_TOKENS = 64


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
    simulation = Simulation(policy, engines, slots, lengths, step_s, seed)
    prompts, samples = lengths.shape
    simulation.run(_groups(prompts, samples, seed))
    assert len(simulation.delays) == lengths.size, "a sample was lost"
    return Result(
        makespan_s=simulation.last,
        delays_s=simulation.delays,
        cpu_us_per_prompt=simulation.cpu_s / len(lengths) * 1e6,
        chunks=len(simulation.chunk_left),
        items=simulation.items,
    )


def _groups(prompts: int, samples: int, seed: int) -> list[RoutedGroup]:
    rng = np.random.default_rng(seed)
    params = DecodingParams(max_tokens=LONGEST)
    return [
        RoutedGroup(
            id=i,
            prompt_ids=rng.integers(0, 1000, PROMPT_TOKENS - 1).astype(np.int32),
            params=params,
            count=samples,
        )
        for i in range(prompts)
    ]


class Simulation:
    """The state of one call."""

    def __init__(
        self,
        policy: PolicyName,
        engines: int,
        slots: int,
        lengths: NDArray[np.int32],
        step_s: tuple[float, float],
        seed: int,
    ) -> None:
        self._lengths = lengths
        self._dispatcher = Dispatcher(build_policy(policy, len(lengths), random.Random(seed)))
        self._engines = {name: Engine(name, slots, step_s) for name in (f"e{i:04d}" for i in range(engines))}
        for name in self._engines:
            self._dispatcher.add_engine(name, slots)
        self._events: list[tuple[float, int, str, int | None]] = []
        """Heap of (time, tie-breaker, engine, engine version whose step ends; None for a delivery)."""
        self._order = itertools.count()
        self._sent: dict[Sample, tuple[int, float]] = {}
        """Chunk and send time of each sample."""
        self.chunk_left: list[int] = []
        """Unfinished samples of each chunk."""
        self.delays: list[float] = []
        """Time of each sample's first step."""
        self.cpu_s = 0.0
        """CPU seconds of the dispatcher."""
        self.items = 0
        self.last = 0.0
        """Time of the last sample's end."""

    def run(self, groups: list[RoutedGroup]) -> None:
        started = time.process_time()
        self._dispatcher.enqueue(groups)
        self.cpu_s += time.process_time() - started
        self._send(0.0)
        while self._events:
            now, _, name, version = heapq.heappop(self._events)
            engine = self._engines[name]
            if version is None:
                self._deliver(engine, now)
            elif version == engine.version:
                self._step(engine, now)

    def _send(self, now: float) -> None:
        started = time.process_time()
        chunks = self._dispatcher.assign()
        self.cpu_s += time.process_time() - started
        for name, chunk in chunks.items():
            engine = self._engines[name]
            engine.advance(now)
            for group in chunk:
                engine.waiting.extend((int(self._lengths[group.id, j]), (group.id, j)) for j in group.samples)
                self._sent.update(((group.id, j), (len(self.chunk_left), now)) for j in group.samples)
            self.chunk_left.append(sum(group.count for group in chunk))
            engine.start(self.delays)
            self._schedule(engine)

    def _schedule(self, engine: Engine) -> None:
        engine.version += 1
        if engine.running:
            heapq.heappush(self._events, (engine.next_end(), next(self._order), engine.name, engine.version))

    def _step(self, engine: Engine, now: float) -> None:
        engine.advance(now)
        ended = engine.take_ended()
        self.last = now
        engine.start(self.delays)
        self._schedule(engine)
        if ended:
            self._hand_back(engine, ended, now)

    def _hand_back(self, engine: Engine, ended: list[Sample], now: float) -> None:
        """Schedules the delivery, as `GroupRunner` does."""
        due = engine.due
        for sample in ended:
            chunk, since = self._sent.pop(sample)
            self.chunk_left[chunk] -= 1
            wait_s = min(max(MIN_FLUSH_S, FLUSH_SHARE * (now - since)), MAX_FLUSH_S) if self.chunk_left[chunk] else 0.0
            due = min(due, now + wait_s)
        engine.ended += ended
        if due < engine.due:
            engine.due = due
            heapq.heappush(self._events, (due + DELIVERY_S, next(self._order), engine.name, None))

    def _deliver(self, engine: Engine, now: float) -> None:
        if now < engine.due + DELIVERY_S:
            return  # an earlier delivery took these samples along
        delivered, engine.ended, engine.due = engine.ended, [], math.inf
        self.items += 1
        started = time.process_time()
        self._dispatcher.finish_samples(engine.name, delivered)
        self._dispatcher.learn(self._lengths[tuple(zip(*delivered, strict=True))])
        self.cpu_s += time.process_time() - started
        self._send(now)
