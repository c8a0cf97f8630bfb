"""A simulated engine: time is computed, and there are no tokens."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

Sample: TypeAlias = tuple[int, int]
"""(group id, index of the sample)."""


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
    numbers: Iterator[int] = field(default_factory=itertools.count)
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
