"""Decides which group goes to which engine, and when. Pure bookkeeping: no Ray, no clock, no awaiting."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.groups import GroupKey
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.policies import EngineLoad, Lengths, Policy
from twinkle_serve.routing.queue import FairQueue

HEADROOM = 1.25
REFILL = 1.125
"""Sequences sent to an engine per sequence that it runs at once: up to HEADROOM, then none until at most REFILL remain,
so that a chunk, which costs two milliseconds, holds several groups. The excess over 1 waits inside the engine, which
starts it at the step after a sequence finishes. The rest waits here for the first engine with room."""


class Dispatcher:
    """Queues groups until the policy has an engine for them, and tracks the groups on each engine.

    Guarantees:
        - A group, or each part of a split group, is on at most one engine at a time.
        - A caller's groups start in order of arrival, and callers take turns.
        - An engine has at most one suspect at a time.
    """

    def __init__(self, policy: Policy) -> None:
        self._engines: dict[str, EngineLoad] = {}
        self._closed: set[str] = set()
        """Engines that finish their groups and get no new ones. They are removed from the policy."""
        self._lengths = Lengths()
        self._waiting = FairQueue(lambda group: self._lengths.cost(group, group.count))
        self._bound: dict[str, deque[RoutedGroup]] = defaultdict(deque)
        """Waiting groups that only one engine may sample, by its name."""
        self._suspects: deque[RoutedGroup] = deque()
        """Groups that may have ended an engine, waiting for one without another suspect."""
        self._placed: defaultdict[int, dict[GroupKey, EngineLoad]] = defaultdict(dict)
        """Engine of each part of a group, by group id."""
        self._policy = policy
        self._too_large = 0
        """Samples of the next group if no engine has room for them; 0: unknown. Saves asking the policy in vain each
        time a sample ends."""

    def add_engine(self, name: str, max_num_seqs: int) -> None:
        """Adds an engine. Idempotent."""
        if name not in self._engines:
            limit = max(1, int(max_num_seqs * HEADROOM))
            self._engines[name] = EngineLoad(name, limit=limit, low=min(limit - 1, int(max_num_seqs * REFILL)))
            self._policy.add(self._engines[name])
            self._too_large = 0

    def remove_engine(self, name: str) -> list[RoutedGroup]:
        """Removes an engine. Returns its unfinished groups, without queueing them again."""
        engine = self._engines.pop(name, None)
        if engine is None:
            return []
        if name in self._closed:
            self._closed.discard(name)
        else:
            self._policy.remove(engine)
        return [part for key in list(engine.groups) for part in self._take(engine, key)]

    def close_engine(self, name: str) -> None:
        """Stops placing groups on an engine; it finishes those it has. Idempotent; unknown engines are ignored."""
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
        """Number of groups that are not on an engine."""
        return len(self._waiting) + len(self._suspects) + sum(map(len, self._bound.values()))

    @property
    def waiting_tokens(self) -> float:
        """Estimated tokens of the waiting groups."""
        return self._waiting.tokens

    def sequences(self, name: str) -> int:
        """Number of unfinished sequences on an engine."""
        return self._engines[name].sequences

    def groups(self, name: str) -> Iterable[RoutedGroup]:
        """Unfinished groups of an engine."""
        return self._engines[name].groups.values()

    def enqueue(self, groups: Iterable[RoutedGroup], *, first: bool = False) -> None:
        """Adds groups at the end of the queue, or at the front if `first`, as for groups of a lost engine."""
        self._too_large = 0
        free: list[RoutedGroup] = []
        for group in groups:
            (self._bound[group.engine] if group.engine else free).append(group)
        if first:
            self._waiting.extend_front(free)
        else:
            self._waiting.extend(free)

    def place(self, group: RoutedGroup) -> str:
        """Places a group at once, bypassing the queue. Needs an open engine. Returns its name."""
        engine = self._policy.choose_now(group)
        self._give(engine, group)
        return engine.name

    def finish_samples(self, name: str, samples: Iterable[tuple[int, int]]) -> None:
        """Removes finished samples, given as (group id, index), from an engine; unknown ones are ignored."""
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

    def finish(self, name: str, keys: Iterable[GroupKey]) -> list[RoutedGroup]:
        """Removes groups from an engine, finished or not. Returns their unfinished samples, as groups."""
        engine = self._engines.get(name)
        if engine is None:
            return []
        rest = [part for key in keys if key in engine.groups for part in self._take(engine, key)]
        if rest:
            self._settle(engine)
        return rest

    def _take(self, engine: EngineLoad, key: GroupKey) -> list[RoutedGroup]:
        """Removes a group from an engine. Returns its unfinished samples, consecutive ones as one group."""
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
        return _consecutive(group, left)

    def _settle(self, engine: EngineLoad) -> None:
        if not engine.groups:  # rounding errors would make idle engines differ
            engine.tokens = 0.0
        if engine.sequences <= engine.low:
            engine.full = False
        if engine.name in self._closed:
            return
        if engine.has_room(self._too_large) or not engine.groups:
            self._too_large = 0
        self._policy.changed(engine)

    def learn(self, lengths: NDArray[np.int32]) -> None:
        """Updates the estimated length of samples from the token counts of finished ones."""
        self._lengths.learn(lengths)

    def withdraw(self, caller: str, group_ids: Sequence[int]) -> dict[str, list[RoutedGroup]]:
        """Drops waiting groups. Returns those on engines, by engine."""
        self._too_large = 0
        self._waiting.withdraw(caller, group_ids)
        if self._suspects or self._bound:
            withdrawn = set(group_ids)
            self._suspects = deque(group for group in self._suspects if group.id not in withdrawn)
            for name, bound in list(self._bound.items()):
                self._set_bound(name, [group for group in bound if group.id not in withdrawn])
        held: dict[str, list[RoutedGroup]] = {}
        for group_id in group_ids:
            for key, engine in self._placed.get(group_id, {}).items():
                held.setdefault(engine.name, []).append(engine.groups[key])
        return held

    def withdraw_waiting(self) -> list[RoutedGroup]:
        """Removes and returns all waiting groups."""
        suspects, self._suspects = list(self._suspects), deque()
        bound = [group for groups in self._bound.values() for group in groups]
        self._bound.clear()
        return suspects + bound + self._waiting.clear()

    def _set_bound(self, name: str, groups: Iterable[RoutedGroup]) -> None:
        if left := deque(groups):
            self._bound[name] = left
        else:
            self._bound.pop(name, None)

    # -- suspects --------------------------------------------------------------------------------

    def suspect(self, group: RoutedGroup) -> None:
        """Queues a suspect: it is placed on an engine without another suspect."""
        self._suspects.append(group)

    def suspect_of(self, name: str) -> GroupKey | None:
        """Key of the suspect on an engine, if any."""
        engine = self._engines.get(name)
        return None if engine is None else engine.suspect

    def clear(self, name: str, key: GroupKey) -> None:
        """Clears a group of suspicion, if it is still the suspect of that engine."""
        engine = self._engines.get(name)
        if engine is not None and engine.suspect == key:
            engine.suspect = None

    def clear_waiting(self) -> None:
        """Clears all waiting groups of suspicion, after another group turned out to be poisoned."""
        suspects, self._suspects = self._suspects, deque()
        self.enqueue(suspects, first=True)

    # -- placing ---------------------------------------------------------------------------------

    def assign(self) -> dict[str, list[RoutedGroup]]:
        """Places waiting groups, each until `finish_samples` or `finish`. Returns the groups to send, by engine."""
        chunks: dict[str, list[RoutedGroup]] = {}
        for engine, group in (*self._assign_suspects(), *self._assign_bound()):
            chunks.setdefault(engine.name, []).append(group)
        while self._waiting and len(self._engines) > len(self._closed) and not self._too_large:
            chosen = self._policy.choose(self._waiting.first(), len(self._waiting))
            if chosen is None:
                limit = min(engine.limit for engine in self._engines.values() if engine.name not in self._closed)
                self._too_large = self._waiting.first().count if self._waiting.first().count <= limit else 1
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

    def _assign_suspects(self) -> list[tuple[EngineLoad, RoutedGroup]]:
        placed = []
        waiting, self._suspects = self._suspects, deque()
        for group in waiting:
            free = [
                engine
                for name, engine in self._engines.items()
                if engine.suspect is None and name not in self._closed and group.engine in ("", name)
            ]
            if not free:
                self._suspects.append(group)
                continue
            engine = min(free, key=lambda engine: engine.tokens / engine.limit)
            self._give(engine, group)
            engine.suspect = group.key
            placed.append((engine, group))
        return placed

    def _assign_bound(self) -> list[tuple[EngineLoad, RoutedGroup]]:
        """Places groups that only one engine may sample, as long as it has room."""
        placed = []
        for name, groups in list(self._bound.items()):
            engine = self._engines.get(name)
            if engine is None or name in self._closed:
                continue
            while groups and (engine.sequences + groups[0].count <= engine.limit or not engine.groups):
                placed.append((engine, groups.popleft()))
                self._give(*placed[-1])
            self._set_bound(name, groups)
        return placed

    def _give(self, engine: EngineLoad, group: RoutedGroup) -> None:
        key, samples = group.key, group.samples
        engine.groups[key] = group
        engine.left[key] = set(samples)
        for sample in samples:
            engine.parts[group.id, sample] = key
        self._placed[group.id][key] = engine
        engine.costs[key] = cost = self._lengths.cost(group, group.count) / group.count
        engine.sequences += group.count
        engine.tokens += cost * group.count
        # Another group of the same size would not fit.
        engine.full = engine.sequences + group.count > engine.limit
        self._policy.changed(engine)


def _consecutive(group: RoutedGroup, left: set[int]) -> list[RoutedGroup]:
    """Samples of a group as groups of consecutive samples."""
    parts: list[RoutedGroup] = []
    for sample in sorted(left):
        if parts and parts[-1].samples.stop == sample:
            parts[-1] = replace(parts[-1], count=parts[-1].count + 1)
        else:
            parts.append(group.part(sample, 1))
    return parts
