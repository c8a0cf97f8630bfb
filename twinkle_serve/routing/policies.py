"""Which engine a group goes to: plain classes, chosen by the config's `policy`. No Ray, no clock, no awaiting."""

from __future__ import annotations

import heapq
import random
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.groups import Group, GroupKey

PolicyName: TypeAlias = Literal["balanced", "round_robin", "static"]


@dataclass(slots=True, eq=False)
class EngineLoad:
    """What an engine has been sent and has not finished."""

    name: str
    limit: int
    """Most sequences that it is sent, where the policy keeps to that."""
    low: int
    """Once it is full, it is sent nothing until it has no more sequences than these: many groups at a time, then."""
    full: bool = False
    groups: dict[GroupKey, Group] = field(default_factory=dict)
    left: dict[GroupKey, set[int]] = field(default_factory=dict)
    """Samples of each group that have not ended."""
    parts: dict[tuple[int, int], GroupKey] = field(default_factory=dict)
    """Which of `groups` has a sample, by its prompt's id and its index."""
    costs: dict[GroupKey, float] = field(default_factory=dict)
    """Of each sample of a group, tokens."""
    sequences: int = 0
    tokens: float = 0.0
    """What all of its sequences cost."""
    suspect: GroupKey | None = None
    """One of its groups that may end it."""

    def has_room(self, samples: int) -> bool:
        """For so many samples of one prompt."""
        return not self.full and self.sequences + samples <= self.limit


class Policy(Protocol):
    """Chooses engines for groups, one after the other. The dispatcher tells it of every change."""

    def add(self, engine: EngineLoad) -> None:
        """An engine comes into use, empty."""

    def remove(self, engine: EngineLoad) -> None:
        """An engine goes out of use."""

    def changed(self, engine: EngineLoad) -> None:
        """An engine in use has been sent something, or has finished something."""

    def choose(self, group: Group, waiting: int) -> tuple[EngineLoad, int] | None:
        """An engine for the next group of the queue, and how many of its samples; None: the group waits until an engine
        has room for it or is empty, or until there are others in the queue or in use.

        There is an engine in use. `waiting` groups are in the queue, this one among them.
        """

    def choose_now(self, group: Group) -> EngineLoad:
        """An engine for a group that goes past the queue, whole."""


class Balanced:
    """The engine with the fewest tokens to do, of those that can start the group soon. Among equals it is the one that
    has had nothing for longest, in an order that begins at random.

    Binds late: what no engine can start soon waits for whoever is free first. A group stays together for its prefix,
    unless engines stand idle. A prompt that continues one which an engine has computed goes there again, as long as
    that engine is not far behind the others.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._engines: dict[str, EngineLoad] = {}
        self._order: list[tuple[float, float, str]] = []
        """Heap of engines with room: relative load, version, name. Entries of other versions than the engine's own are
        old."""
        self._versions: dict[str, float] = {}
        """By engine: a larger one at each change of its load."""
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
        # Few prompts of many samples: share each out, or engines stand idle.
        share = group.count
        if len(self._idle) > waiting:
            share = -(-group.count * waiting // len(self._idle))
        engine = self._least_loaded(share)
        if engine is None:
            # A part of a group that fits would compute its prefix twice, so a group waits for room for all of it,
            # unless no engine could ever have that.
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
        """Of those that have room for so many samples; None if none of the first few has."""
        too_full: list[tuple[float, float, str]] = []
        found = None
        while self._order and found is None and len(too_full) < MAX_TRIES:
            entry = self._order[0]
            if self._versions.get(entry[2]) != entry[1]:
                heapq.heappop(self._order)
            elif not self._engines[entry[2]].has_room(samples):
                too_full.append(heapq.heappop(self._order))
            else:
                found = self._engines[entry[2]]
        for entry in too_full:
            heapq.heappush(self._order, entry)
        return found

    def _holder(self, group: Group, least: EngineLoad) -> EngineLoad | None:
        """The engine that has computed what the prompt continues, if it has room and is not far behind the least."""
        name = self._prefixes.engine_of(group)
        holder = None if name is None else self._engines.get(name)
        if holder is None or not holder.has_room(group.count):
            return None
        ahead = holder.sequences / holder.limit - least.sequences / least.limit
        return holder if ahead <= AFFINITY_MARGIN else None


MAX_TRIES = 8
"""Engines that are looked at for one with room for a whole group. The less they have to do, the more room they have."""

AFFINITY_MARGIN = 0.25
"""How much fuller, as a share of what it may be sent, an engine may be than the least loaded one and still be preferred
for what it has computed."""


class RoundRobin:
    """Each group to the next engine, at once, however long that one's queue is."""

    def __init__(self, rng: random.Random) -> None:
        self._engines: list[EngineLoad] = []
        self._next = 0

    def add(self, engine: EngineLoad) -> None:
        self._engines.append(engine)

    def remove(self, engine: EngineLoad) -> None:
        self._engines.remove(engine)

    def changed(self, engine: EngineLoad) -> None:
        pass

    def choose(self, group: Group, waiting: int) -> tuple[EngineLoad, int] | None:
        return self.choose_now(group), group.count

    def choose_now(self, group: Group) -> EngineLoad:
        self._next += 1
        return self._engines[self._next % len(self._engines)]


class Static:
    """Slices: the prompts of a call are cut into as many parts as there are engines, in order, as upstream's sampler
    does. For comparison."""

    def __init__(self, rng: random.Random) -> None:
        self._engines: dict[str, EngineLoad] = {}

    def add(self, engine: EngineLoad) -> None:
        self._engines[engine.name] = engine
        self._engines = dict(sorted(self._engines.items()))

    def remove(self, engine: EngineLoad) -> None:
        del self._engines[engine.name]

    def changed(self, engine: EngineLoad) -> None:
        pass

    def choose(self, group: Group, waiting: int) -> tuple[EngineLoad, int] | None:
        return self.choose_now(group), group.count

    def choose_now(self, group: Group) -> EngineLoad:
        engines = list(self._engines.values())
        return engines[group.index * len(engines) // group.prompts]


POLICIES: dict[PolicyName, Callable[[random.Random], Policy]] = {
    "balanced": Balanced,
    "round_robin": RoundRobin,
    "static": Static,
}


BLOCK = 64
"""Tokens of a prompt that are looked at together. vLLM's own blocks are 16 to 128."""
MAX_PREFIXES = 100_000


class Prefixes:
    """Which engine has computed which prompts, by their beginnings; the oldest are forgotten."""

    def __init__(self) -> None:
        self._engines: OrderedDict[int, str] = OrderedDict()

    def learn(self, group: Group, engine: str) -> None:
        """The engine is sent a prompt."""
        *_, whole = [None, *_blocks(group.prompt_ids)]
        if whole is not None:
            self._engines[whole] = engine
            self._engines.move_to_end(whole)
            if len(self._engines) > MAX_PREFIXES:
                self._engines.popitem(last=False)

    def engine_of(self, group: Group) -> str | None:
        """The engine that has computed at least half of a prompt, as a prompt of its own. Less than that is a system
        prompt that all have in common, and no reason to go where the others are."""
        hashes = list(_blocks(group.prompt_ids))
        for number in range(len(hashes) - 1, -1, -1):
            if 2 * (number + 1) * BLOCK < len(group.prompt_ids):
                return None
            if (engine := self._engines.get(hashes[number])) is not None:
                return engine
        return None


def _blocks(ids: NDArray[np.int32]) -> Iterator[int]:
    """Hash of the first block, of the first two, and so on."""
    data = np.ascontiguousarray(ids, np.int32)
    state = 0
    for start in range(0, len(data) - BLOCK + 1, BLOCK):
        # The number of the block takes part: 32 bits alone meet too often among many prompts.
        state = zlib.crc32(data[start : start + BLOCK].data, state)
        yield state << 20 | start // BLOCK


class Lengths:
    """How many tokens a sample may be expected to have: the mean of those that were seen, the latest 10,000 or so."""

    FIRST_GUESS = 256.0
    MEMORY = 10_000

    def __init__(self) -> None:
        self._mean, self._weight = self.FIRST_GUESS, 1.0

    def learn(self, lengths: NDArray[np.int32]) -> None:
        """Samples have ended."""
        if not len(lengths):
            return
        weight = min(self._weight, self.MEMORY)
        self._mean = (self._mean * weight + float(lengths.sum())) / (weight + len(lengths))
        self._weight = weight + len(lengths)

    def cost(self, group: Group, samples: int) -> float:
        """Tokens that an engine has to do for some samples of a group: a prompt token is a good deal cheaper."""
        most = group.params.max_tokens
        new = self._mean if most is None else min(self._mean, most)
        return samples * max(1.0, new) + PROMPT_TOKEN_COST * len(group.prompt_ids)


PROMPT_TOKEN_COST = 0.05
"""Of a prompt's token, in sampled ones: a prefill computes many at a time."""
