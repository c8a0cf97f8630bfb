"""Policies that choose an engine for a group, by the config's `policy`. No Ray, no clock, no awaiting."""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cachetools import FIFOCache
from numpy.typing import NDArray

from twinkle_serve.config import PolicyName
from twinkle_serve.data_format.groups import Group, GroupKey
from twinkle_serve.routing.groups import RoutedGroup


@dataclass(slots=True, eq=False)
class EngineLoad:
    """Unfinished groups of an engine."""

    name: str
    limit: int
    """Maximum number of sequences."""
    low: int
    """A full engine gets no groups until it is down to this many sequences; then several at once."""
    full: bool = False
    groups: dict[GroupKey, RoutedGroup] = field(default_factory=dict)
    left: dict[GroupKey, set[int]] = field(default_factory=dict)
    """Unfinished samples of each group."""
    parts: dict[tuple[int, int], GroupKey] = field(default_factory=dict)
    """Group of each unfinished sample, by (group id, sample index)."""
    costs: dict[GroupKey, float] = field(default_factory=dict)
    """Estimated tokens of each sample of a group."""
    sequences: int = 0
    tokens: float = 0.0
    """Estimated tokens of all its sequences."""
    suspect: GroupKey | None = None
    """Key of the group suspected of ending engines."""

    def has_room(self, samples: int) -> bool:
        """Whether that many samples of one prompt fit."""
        return not self.full and self.sequences + samples <= self.limit


class Policy(Protocol):
    """Chooses an engine for one group at a time. The dispatcher reports every change."""

    def add(self, engine: EngineLoad) -> None:
        """Adds an empty engine."""

    def remove(self, engine: EngineLoad) -> None:
        """Removes an engine."""

    def changed(self, engine: EngineLoad) -> None:
        """Called when the load of an engine has changed."""

    def choose(self, group: Group, waiting: int) -> tuple[EngineLoad, int] | None:
        """Chooses an engine for the next group of the queue, and the number of its samples to place there. None: the
        group waits until an engine has room or is empty, or until the queue or the set of engines changes.

        Needs at least one engine. `waiting` groups are in the queue, this one included.
        """

    def choose_now(self, group: Group) -> EngineLoad:
        """Chooses an engine for a whole group that bypasses the queue."""


class Balanced:
    """Chooses the engine with the fewest tokens to do among those that can start the group soon; on a tie, the one
    whose load has been unchanged for longest, in an initially random order.

    Binds late: a group that no engine can start soon waits for the first one with room. A group stays together, to
    share its prefix, unless engines are idle. A prompt that continues an earlier one goes to the engine that computed
    it, unless that engine is much fuller than the others.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._engines: dict[str, EngineLoad] = {}
        self._order: list[tuple[float, float, str]] = []
        """Heap of engines with room: relative load, version, name. An entry is stale if its version is not the
        engine's."""
        self._versions: dict[str, float] = {}
        """Version of each engine, increased at each change of its load."""
        self._counter = 0.0
        self._idle: set[str] = set()
        self._prefixes = Prefixes()

    def add(self, engine: EngineLoad) -> None:
        self._engines[engine.name] = engine
        self._enter(engine, -self._rng.random())

    def remove(self, engine: EngineLoad) -> None:
        del self._engines[engine.name]
        self._versions.pop(engine.name, None)
        self._idle.discard(engine.name)

    def changed(self, engine: EngineLoad) -> None:
        self._counter += 1
        self._enter(engine, self._counter)

    def _enter(self, engine: EngineLoad, version: float) -> None:
        self._versions[engine.name] = version
        if engine.sequences:
            self._idle.discard(engine.name)
        else:
            self._idle.add(engine.name)
        if engine.has_room(1):
            heapq.heappush(self._order, (engine.tokens / engine.limit, version, engine.name))
        if len(self._order) > 4 * len(self._engines) + 64:
            self._order = [entry for entry in self._order if self._versions.get(entry[2]) == entry[1]]
            heapq.heapify(self._order)

    def choose(self, group: Group, waiting: int) -> tuple[EngineLoad, int] | None:
        # With few prompts of many samples, split each, so that no engine is idle.
        share = group.count
        if len(self._idle) > waiting:
            share = -(-group.count * waiting // len(self._idle))
        engine = self._least_loaded(share)
        if engine is None:
            # Splitting a group computes its prefix twice, so it waits for an engine with room for all of it, unless
            # it is too large for any.
            engine = self._least_loaded(1)
            if engine is None or (engine.sequences and group.count <= engine.limit):
                return None
            share = min(group.count, engine.limit - engine.sequences)
        elif share == group.count:
            engine = self._holder(group, engine) or engine
        self._prefixes.learn(group, engine.name)
        return engine, share

    def choose_now(self, group: Group) -> EngineLoad:
        engine = self._least_loaded(1) or min(self._engines.values(), key=lambda engine: engine.tokens / engine.limit)
        engine = self._holder(group, engine) or engine
        self._prefixes.learn(group, engine.name)
        return engine

    def _least_loaded(self, samples: int) -> EngineLoad | None:
        """Returns the least loaded engine with room for that many samples; None if none of the first few has."""
        too_full: list[tuple[float, float, str]] = []
        engine = None
        while self._order and engine is None and len(too_full) < MAX_TRIES:
            entry = self._order[0]
            if self._versions.get(entry[2]) != entry[1]:
                heapq.heappop(self._order)
            elif not self._engines[entry[2]].has_room(samples):
                too_full.append(heapq.heappop(self._order))
            else:
                engine = self._engines[entry[2]]
        for entry in too_full:
            heapq.heappush(self._order, entry)
        return engine

    def _holder(self, group: Group, least: EngineLoad) -> EngineLoad | None:
        """Returns the engine that computed the prompt's prefix, if it has room and is not much fuller than `least`."""
        name = self._prefixes.engine_of(group)
        holder = None if name is None else self._engines.get(name)
        if holder is None or not holder.has_room(group.count):
            return None
        ahead = holder.sequences / holder.limit - least.sequences / least.limit
        return holder if ahead <= AFFINITY_MARGIN else None


MAX_TRIES = 8
"""Engines tried for one with room for a whole group. The less loaded they are, the more room they have."""

AFFINITY_MARGIN = 0.25
"""How much fuller than the least loaded engine, as a share of its limit, an engine may be and still be chosen for its
cached prefix."""


POLICIES: dict[PolicyName, Callable[[], Policy]] = {"balanced": Balanced}


BLOCK = 64
"""Tokens per hashed block of a prompt. vLLM's own blocks are 16 to 128."""
MAX_PREFIXES = 100_000


class Prefixes:
    """Remembers which engine computed which prompts, by hashes of their prefixes; the oldest are dropped."""

    def __init__(self) -> None:
        self._engines: FIFOCache[int, str] = FIFOCache(MAX_PREFIXES)

    def learn(self, group: Group, engine: str) -> None:
        """Records that an engine gets a prompt."""
        *_, whole = [None, *_blocks(group.prompt_ids)]
        if whole is not None:
            self._engines[whole] = engine

    def engine_of(self, group: Group) -> str | None:
        """Returns the engine that computed an earlier prompt which is at least the first half of this one. A shorter
        common prefix is a shared system prompt, and no reason to gather all prompts on one engine."""
        hashes = list(_blocks(group.prompt_ids))
        for number in range(len(hashes) - 1, -1, -1):
            if 2 * (number + 1) * BLOCK < len(group.prompt_ids):
                return None
            if (engine := self._engines.get(hashes[number])) is not None:
                return engine
        return None


def _blocks(ids: NDArray[np.int32]) -> Iterator[int]:
    """Yields the hash of the first block, of the first two, and so on."""
    data = np.ascontiguousarray(ids, np.int32)
    state = 0
    for start in range(0, len(data) - BLOCK + 1, BLOCK):
        # The block number is included: 32 bits alone collide too often among many prompts.
        state = zlib.crc32(data[start : start + BLOCK].data, state)
        yield state << 20 | start // BLOCK


class Lengths:
    """Estimates the tokens of a sample: the mean of about the last 10,000."""

    FIRST_GUESS = 256.0
    MEMORY = 10_000

    def __init__(self) -> None:
        self._mean, self._weight = self.FIRST_GUESS, 1.0

    def learn(self, lengths: NDArray[np.int32]) -> None:
        """Records the token counts of finished samples."""
        if not len(lengths):
            return
        weight = min(self._weight, self.MEMORY)
        self._mean = (self._mean * weight + float(lengths.sum())) / (weight + len(lengths))
        self._weight = weight + len(lengths)

    def cost(self, group: Group, samples: int) -> float:
        """Estimated cost of some samples of a group, in sampled tokens."""
        limit = group.params.max_tokens
        new = self._mean if limit is None else min(self._mean, limit)
        return samples * max(1.0, new) + PROMPT_TOKEN_COST * len(group.prompt_ids)


PROMPT_TOKEN_COST = 0.05
"""Cost of a prompt token, in sampled tokens: a prefill computes many at a time."""
