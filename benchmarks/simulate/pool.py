"""Baselines for routers: a lower bound, and one queue for all engines."""

from __future__ import annotations

import heapq
from collections import deque

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulate.engine import Engine


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
    whose steps take as long as in the simulation; lengths are unknown in advance. No router that knows no lengths and
    moves no running samples can be counted on to do better.
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
