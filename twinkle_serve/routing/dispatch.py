"""Which group goes to which engine, and when. Bookkeeping alone: no Ray, no clock, no awaiting."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.groups import Group, GroupKey
from twinkle_serve.routing.policies import POLICIES, EngineLoad, Lengths, PolicyName
from twinkle_serve.routing.queue import FairQueue

HEADROOM = 1.25
REFILL = 1.125
"""Sequences sent to an engine per sequence that it runs at once: up to HEADROOM, and again when no more than REFILL are
left, so that a chunk, which costs two milliseconds, is of several groups. What is over 1 waits inside the engine: a
finished sequence is followed at the next step. What the engine cannot start soon waits here, for whoever is free."""


class Dispatcher:
    """Keeps groups until the policy has an engine for them, and knows what each engine has.

    Guarantees: a group, or each part of a split one, is with at most one engine at a time.
    Guarantees: a caller's groups start in the order in which they came, and callers take turns.
    Guarantees: an engine has one suspect at a time.
    """

    def __init__(self, policy: PolicyName = "balanced", rng: random.Random | None = None) -> None:
        self._engines: dict[str, EngineLoad] = {}
        self._closed: set[str] = set()
        """Engines that finish what they have and are given nothing more. The policy does not know of them."""
        self._lengths = Lengths()
        self._waiting = FairQueue(lambda group: self._lengths.cost(group, group.count))
        self._suspects: deque[Group] = deque()
        """Groups that may end the engine that they are on, and wait for one without another suspect."""
        self._placed: defaultdict[int, dict[GroupKey, EngineLoad]] = defaultdict(dict)
        """Where the parts of each group are, by its id."""
        self._policy = POLICIES[policy](rng or random.Random())
        self._too_large = 0
        """Samples of the next group, when no engine has room for them; 0: not known. Else the policy would look for
        room at each sample that ends, in vain."""

    def add_engine(self, name: str, max_num_seqs: int) -> None:
        """Puts an engine into use; one that is in use already is left as it is."""
        if name not in self._engines:
            limit = max(1, int(max_num_seqs * HEADROOM))
            self._engines[name] = EngineLoad(name, limit=limit, low=min(limit - 1, int(max_num_seqs * REFILL)))
            self._policy.add(self._engines[name])
            self._too_large = 0

    def remove_engine(self, name: str) -> list[Group]:
        """Takes an engine out of use. Returns what it had not finished, which goes nowhere by itself."""
        engine = self._engines.pop(name, None)
        if engine is None:
            return []
        if name in self._closed:
            self._closed.discard(name)
        else:
            self._policy.remove(engine)
        return [part for key in list(engine.groups) for part in self._take(engine, key)]

    def close_engine(self, name: str) -> None:
        """Gives an engine nothing more; it goes on with what it has. Again, or one that is not in use: nothing."""
        if name in self._engines and name not in self._closed:
            self._closed.add(name)
            self._policy.remove(self._engines[name])
            self._too_large = 0

    def open_engine(self, name: str) -> None:
        """Undoes `close_engine`."""
        if name in self._closed:
            self._closed.discard(name)
            self._policy.add(self._engines[name])
            self._too_large = 0

    @property
    def engines(self) -> list[str]:
        return list(self._engines)

    @property
    def waiting(self) -> int:
        """Groups that no engine has."""
        return len(self._waiting) + len(self._suspects)

    @property
    def waiting_tokens(self) -> float:
        """Tokens that these will take, about."""
        return self._waiting.tokens

    def sequences(self, name: str) -> int:
        """Sequences that an engine has been sent and has not finished."""
        return self._engines[name].sequences

    def groups(self, name: str) -> Iterable[Group]:
        """What an engine has, whole or the rest of it."""
        return self._engines[name].groups.values()

    def enqueue(self, groups: Iterable[Group], *, first: bool = False) -> None:
        """Adds groups at the end, or, where an engine has lost them, at the front."""
        self._too_large = 0
        if first:
            self._waiting.extend_front(groups)
        else:
            self._waiting.extend(groups)

    def place(self, group: Group) -> str:
        """Puts a group onto an engine at once, past the queue; there must be an open one. Returns its name."""
        engine = self._policy.choose_now(group)
        self._give(engine, group)
        return engine.name

    def ended(self, name: str, samples: Iterable[tuple[int, int]]) -> None:
        """An engine has finished samples, each by its group's id and its index; those it does not have are passed
        over."""
        engine = self._engines.get(name)
        if engine is None:
            return
        changed = False
        for sample in samples:
            if (key := engine.parts.pop(sample, None)) is None:
                continue
            changed = True
            left = engine.left[key]
            left.discard(sample[1])
            engine.sequences -= 1
            engine.tokens -= engine.costs[key]
            if not left:
                self._take(engine, key)
        if changed:
            self._settle(engine)

    def finish(self, name: str, keys: Iterable[GroupKey]) -> list[Group]:
        """An engine is done with groups, whatever came of them. Returns what it had left of them, as groups."""
        engine = self._engines.get(name)
        if engine is None:
            return []
        rest = [part for key in keys if key in engine.groups for part in self._take(engine, key)]
        if rest:
            self._settle(engine)
        return rest

    def _take(self, engine: EngineLoad, key: GroupKey) -> list[Group]:
        """Takes a group from an engine. Returns the samples of it that are not finished, neighbours together."""
        group, left, cost = engine.groups.pop(key), engine.left.pop(key), engine.costs.pop(key)
        placed = self._placed[key[0]]
        del placed[key]
        if not placed:
            del self._placed[key[0]]
        if engine.suspect == key:
            engine.suspect = None
        for sample in left:
            del engine.parts[key[0], sample]
        engine.sequences -= len(left)
        engine.tokens -= cost * len(left)
        return _runs(group, left)

    def _settle(self, engine: EngineLoad) -> None:
        if not engine.groups:  # or rounding would tell idle engines apart
            engine.tokens = 0.0
        if engine.sequences <= engine.low:
            engine.full = False
        if engine.name in self._closed:
            return
        if engine.has_room(self._too_large) or not engine.groups:
            self._too_large = 0
        self._policy.changed(engine)

    def learn(self, lengths: NDArray[np.int32]) -> None:
        """Samples of these many tokens have ended; what others will cost is guessed by them."""
        self._lengths.learn(lengths)

    def withdraw(self, caller: str, group_ids: Sequence[int]) -> dict[str, list[Group]]:
        """Drops groups that no engine has yet; returns those that engines have, by engine."""
        self._too_large = 0
        self._waiting.withdraw(caller, group_ids)
        if self._suspects:
            gone = set(group_ids)
            self._suspects = deque(group for group in self._suspects if group.id not in gone)
        held: dict[str, list[Group]] = {}
        for group_id in group_ids:
            for key, engine in self._placed.get(group_id, {}).items():
                held.setdefault(engine.name, []).append(engine.groups[key])
        return held

    def withdraw_waiting(self) -> list[Group]:
        """Takes all groups that no engine has out of the queue."""
        suspects, self._suspects = list(self._suspects), deque()
        return suspects + self._waiting.clear()

    # -- suspects --------------------------------------------------------------------------------

    def suspect(self, group: Group) -> None:
        """Adds a group that may end its engine: it is sent to one that has no other suspect."""
        self._suspects.append(group)

    def suspect_of(self, name: str) -> GroupKey | None:
        """The suspect that an engine has."""
        engine = self._engines.get(name)
        return None if engine is None else engine.suspect

    def clear(self, name: str, key: GroupKey) -> None:
        """A group is no suspect any more, if it still is the engine's."""
        engine = self._engines.get(name)
        if engine is not None and engine.suspect == key:
            engine.suspect = None

    def clear_waiting(self) -> None:
        """Another one was poisoned: no group that waits is a suspect any more."""
        suspects, self._suspects = self._suspects, deque()
        self.enqueue(suspects, first=True)

    # -- placing ---------------------------------------------------------------------------------

    def assign(self) -> dict[str, list[Group]]:
        """Groups to send now, by engine. They count as the engine's until they end or `finish`."""
        chunks: dict[str, list[Group]] = {}
        for engine, group in self._assign_suspects():
            chunks.setdefault(engine.name, []).append(group)
        while self._waiting and len(self._engines) > len(self._closed) and not self._too_large:
            chosen = self._policy.choose(self._waiting.first(), len(self._waiting))
            if chosen is None:
                most = min(engine.limit for engine in self._engines.values() if engine.name not in self._closed)
                self._too_large = self._waiting.first().count if self._waiting.first().count <= most else 1
                break
            engine, share = chosen
            group = self._waiting.pop()
            if share < group.count:
                first = group.first_sample
                self._waiting.extend_front([group.part(first + share, group.count - share)])
                group = replace(group, count=share)
            self._give(engine, group)
            chunks.setdefault(engine.name, []).append(group)
        return chunks

    def _assign_suspects(self) -> list[tuple[EngineLoad, Group]]:
        placed = []
        while self._suspects:
            free = [
                engine for name, engine in self._engines.items() if engine.suspect is None and name not in self._closed
            ]
            if not free:
                break
            engine, group = min(free, key=lambda engine: engine.tokens / engine.limit), self._suspects.popleft()
            self._give(engine, group)
            engine.suspect = group.key
            placed.append((engine, group))
        return placed

    def _give(self, engine: EngineLoad, group: Group) -> None:
        engine.groups[group.key] = group
        engine.left[group.key] = set(group.samples)
        for sample in group.samples:
            engine.parts[group.id, sample] = group.key
        self._placed[group.id][group.key] = engine
        engine.costs[group.key] = cost = self._lengths.cost(group, group.count) / group.count
        engine.sequences += group.count
        engine.tokens += cost * group.count
        # Whether another one like it has room.
        engine.full = engine.sequences + group.count > engine.limit
        self._policy.changed(engine)


def _runs(group: Group, left: set[int]) -> list[Group]:
    """Some samples of a group as groups of neighbours."""
    parts: list[Group] = []
    for sample in sorted(left):
        if parts and parts[-1].samples.stop == sample:
            parts[-1] = replace(parts[-1], count=parts[-1].count + 1)
        else:
            parts.append(group.part(sample, 1))
    return parts
