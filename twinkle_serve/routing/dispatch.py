"""Which group goes to which engine, and when. Bookkeeping alone: no Ray, no clock, no awaiting."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from twinkle_serve.data_format.groups import Group, GroupKey

HEADROOM = 1.25
"""Sequences sent to an engine per sequence that it runs at once. What is over 1 waits inside the engine, so that a
finished sequence is followed at the next step; what the engine cannot start soon waits here, for whoever is free."""


@dataclass(slots=True)
class _EngineLoad:
    limit: int
    """Most sequences that it is sent at a time."""
    groups: dict[GroupKey, Group] = field(default_factory=dict)
    sequences: int = 0


class Dispatcher:
    """Keeps groups until an engine can start them soon, and hands each to the least loaded one.

    Guarantees: a group, or each part of a split one, is with at most one engine at a time.
    Guarantees: groups start in the order in which they came, parts of one prompt together unless engines idle.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self._engines: dict[str, _EngineLoad] = {}
        self._waiting: deque[Group] = deque()
        self._rng = rng or random.Random()

    def add_engine(self, name: str, max_num_seqs: int) -> None:
        """Puts an engine into use; one that is in use already is left as it is."""
        self._engines.setdefault(name, _EngineLoad(limit=max(1, int(max_num_seqs * HEADROOM))))

    def remove_engine(self, name: str) -> list[Group]:
        """Takes an engine out of use. Returns the groups that it had, which go nowhere by themselves."""
        load = self._engines.pop(name, None)
        return [] if load is None else list(load.groups.values())

    @property
    def engines(self) -> list[str]:
        return list(self._engines)

    @property
    def waiting(self) -> int:
        """Groups that no engine has."""
        return len(self._waiting)

    def sequences(self, name: str) -> int:
        """Sequences that an engine has been sent and has not finished."""
        return self._engines[name].sequences

    def enqueue(self, groups: Iterable[Group], *, first: bool = False) -> None:
        """Adds groups at the end, or, where an engine has lost them, at the front."""
        if first:
            self._waiting.extendleft(reversed(list(groups)))
        else:
            self._waiting.extend(groups)

    def place(self, group: Group) -> str:
        """Puts a group onto the least loaded engine at once, past the queue; there must be one. Returns its name."""
        name = self._least_loaded()
        self._engines[name].groups[group.key] = group
        self._engines[name].sequences += group.count
        return name

    def finish(self, name: str, keys: Iterable[GroupKey]) -> list[Group]:
        """An engine is done with groups, whatever came of them. Returns those that it had, passing over the others."""
        load = self._engines.get(name)
        if load is None:
            return []
        done = [group for key in keys if (group := load.groups.pop(key, None)) is not None]
        load.sequences -= sum(group.count for group in done)
        return done

    def withdraw(self, group_ids: range) -> dict[str, list[Group]]:
        """Drops groups that no engine has yet; returns those that engines have, by engine."""
        self._waiting = deque(group for group in self._waiting if group.id not in group_ids)
        held = {
            name: [group for group in load.groups.values() if group.id in group_ids]
            for name, load in self._engines.items()
        }
        return {name: groups for name, groups in held.items() if groups}

    def withdraw_waiting(self) -> list[Group]:
        """Takes all groups that no engine has out of the queue."""
        waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def assign(self) -> dict[str, list[Group]]:
        """Groups to send now, by engine. They count as the engine's until `finish`."""
        chunks: dict[str, list[Group]] = {}
        while self._waiting and self._engines:
            name = self._least_loaded()
            load = self._engines[name]
            group = self._waiting[0]
            spare = load.limit - load.sequences
            if spare <= 0:
                break
            # Few prompts of many samples: share each out, or engines stand idle.
            idle = sum(not other.sequences for other in self._engines.values())
            share = group.count
            if idle > len(self._waiting):
                share = -(-group.count * len(self._waiting) // idle)
            # A part of a group that fits would compute its prefix twice, so a group waits for room for all of it,
            # unless no engine could ever have that.
            if share > spare:
                if load.sequences and group.count <= load.limit:
                    break
                share = spare
            self._waiting.popleft()
            if share < group.count:
                rest = replace(
                    group,
                    first_sample=group.first_sample + share,
                    count=group.count - share,
                    seed=group.seed_of(share),
                )
                self._waiting.appendleft(rest)
                group = replace(group, count=share)
            load.groups[group.key] = group
            load.sequences += group.count
            chunks.setdefault(name, []).append(group)
        return chunks

    def _least_loaded(self) -> str:
        """Relative to what each can hold; at random among ties, or the first engine would get every lone prompt."""
        load = {name: engine.sequences / engine.limit for name, engine in self._engines.items()}
        least = min(load.values())
        return self._rng.choice([name for name, value in load.items() if value == least])
