"""Which group goes to which engine, and when. Bookkeeping alone: no Ray, no clock, no awaiting."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.groups import Group, GroupKey
from twinkle_serve.routing.policies import POLICIES, EngineLoad, Lengths, PolicyName, occupancy

HEADROOM = 1.25
"""Sequences sent to an engine per sequence that it runs at once. What is over 1 waits inside the engine, so that a
finished sequence is followed at the next step; what the engine cannot start soon waits here, for whoever is free."""


class Dispatcher:
    """Keeps groups until the policy has an engine for them, and knows what each engine has.

    Guarantees: a group, or each part of a split one, is with at most one engine at a time.
    Guarantees: groups start in the order in which they came.
    """

    def __init__(self, policy: PolicyName = "balanced", rng: random.Random | None = None) -> None:
        self._engines: dict[str, EngineLoad] = {}
        self._waiting: deque[Group] = deque()
        self._policy = POLICIES[policy](rng or random.Random())
        self._lengths = Lengths()

    def add_engine(self, name: str, max_num_seqs: int) -> None:
        """Puts an engine into use; one that is in use already is left as it is."""
        if name not in self._engines:
            self._engines[name] = EngineLoad(name, limit=max(1, int(max_num_seqs * HEADROOM)))
            self._policy.add(self._engines[name])

    def remove_engine(self, name: str) -> list[Group]:
        """Takes an engine out of use. Returns the groups that it had, which go nowhere by themselves."""
        engine = self._engines.pop(name, None)
        if engine is None:
            return []
        self._policy.remove(engine)
        return list(engine.groups.values())

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
        """Puts a group onto an engine at once, past the queue; there must be one. Returns its name."""
        engine = self._policy.choose_now(group)
        self._give(engine, group)
        return engine.name

    def finish(self, name: str, keys: Iterable[GroupKey]) -> list[Group]:
        """An engine is done with groups, whatever came of them. Returns those that it had, passing over the others."""
        engine = self._engines.get(name)
        if engine is None:
            return []
        done = [group for key in keys if (group := engine.groups.pop(key, None)) is not None]
        if done:
            engine.sequences -= sum(group.count for group in done)
            engine.occupied -= sum(occupancy(group.count) for group in done)
            engine.tokens -= sum(engine.costs.pop(group.key) for group in done)
            if not engine.groups:  # or rounding would tell idle engines apart
                engine.occupied = engine.tokens = 0.0
            self._policy.changed(engine)
        return done

    def learn(self, lengths: NDArray[np.int32]) -> None:
        """Samples of these many tokens have ended; what others will cost is guessed by them."""
        self._lengths.learn(lengths)

    def withdraw(self, group_ids: range) -> dict[str, list[Group]]:
        """Drops groups that no engine has yet; returns those that engines have, by engine."""
        self._waiting = deque(group for group in self._waiting if group.id not in group_ids)
        held = {
            name: [group for group in engine.groups.values() if group.id in group_ids]
            for name, engine in self._engines.items()
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
            chosen = self._policy.choose(self._waiting[0], len(self._waiting))
            if chosen is None:
                break
            engine, share = chosen
            group = self._waiting.popleft()
            if share < group.count:
                rest = replace(
                    group,
                    first_sample=group.first_sample + share,
                    count=group.count - share,
                    seed=group.seed_of(share),
                )
                self._waiting.appendleft(rest)
                group = replace(group, count=share)
            self._give(engine, group)
            chunks.setdefault(engine.name, []).append(group)
        return chunks

    def _give(self, engine: EngineLoad, group: Group) -> None:
        engine.groups[group.key] = group
        engine.costs[group.key] = cost = self._lengths.cost(group, group.count)
        engine.sequences += group.count
        engine.occupied += occupancy(group.count)
        engine.tokens += cost
        self._policy.changed(engine)
