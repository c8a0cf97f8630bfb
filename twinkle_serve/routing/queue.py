"""The queue of groups that wait for an engine."""

from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from twinkle_serve.data_format.groups import GroupKey
from twinkle_serve.routing.groups import RoutedGroup


@dataclass(slots=True)
class _Caller:
    groups: OrderedDict[GroupKey, RoutedGroup] = field(default_factory=OrderedDict)
    turn: float = 0.0
    """Tokens sent for it so far; the caller with the fewest is next."""


MAX_ABSENT = 1000
"""Callers with nothing waiting whose turns are remembered; beyond that, turns in the past are dropped."""

Key: TypeAlias = tuple[int, str]
"""Priority of groups, and their caller."""


class FairQueue:
    """A fair queue: callers take turns by tokens, and each caller's groups leave in order of arrival.

    Guarantees:
        - Groups of a lower priority number leave before all others.
        - Among equal ones, a caller waits for at most one group of each other caller at a time, however many those have
          waiting.
        - Groups put in front are next, whoever their caller is.

    Source: start-time fair queueing (Goyal et al., 1996), each caller of the same weight.
    """

    def __init__(self, cost: Callable[[RoutedGroup], float]) -> None:
        """
        Args:
            cost: estimates the tokens of a group.
        """
        self._cost = cost
        self._front: deque[RoutedGroup] = deque()
        self._callers: dict[Key, _Caller] = {}
        """Callers with groups waiting."""
        self._turns: list[tuple[int, float, int, Key]] = []
        """Heap of callers: priority, turn, tie-breaker, key."""
        self._absent_turns: dict[Key, float] = {}
        """Turns of callers with nothing waiting, which may be ahead of `_now`."""
        self._now: defaultdict[int, float] = defaultdict(float)
        """Turn of the last caller served, by priority."""
        self._entries = 0
        self._length = 0
        self.tokens = 0.0
        """Cost of the waiting groups, as estimated on arrival."""
        self._costs: dict[GroupKey, float] = {}

    def __len__(self) -> int:
        return self._length

    def extend(self, groups: Iterable[RoutedGroup]) -> None:
        """Adds groups at the end of their callers' queues."""
        for group in groups:
            key = (group.priority, group.caller)
            caller = self._callers.get(key)
            if caller is None:
                # An absent caller accumulates no credit and keeps its debt.
                turn = max(self._now[group.priority], self._absent_turns.pop(key, 0.0))
                caller = self._callers[key] = _Caller(turn=turn)
                self._enter(key)
            caller.groups[group.key] = group
            self._count(group)

    def extend_front(self, groups: Iterable[RoutedGroup]) -> None:
        """Puts groups in front of all others, in the given order."""
        groups = list(groups)
        self._front.extendleft(reversed(groups))
        for group in groups:
            self._count(group)

    def _count(self, group: RoutedGroup) -> None:
        self._length += 1
        self._costs[group.key] = cost = self._cost(group)
        self.tokens += cost

    def _uncount(self, group: RoutedGroup) -> float:
        self._length -= 1
        cost = self._costs.pop(group.key)
        self.tokens = self.tokens - cost if self._length else 0.0
        return cost

    def _enter(self, key: Key) -> None:
        self._entries += 1
        heapq.heappush(self._turns, (key[0], self._callers[key].turn, self._entries, key))

    def _next(self) -> Key:
        """Returns the caller whose turn it is; the queue must not be empty."""
        while True:
            _, turn, _, key = self._turns[0]
            caller = self._callers.get(key)
            if caller is not None and caller.turn == turn and caller.groups:
                return key
            heapq.heappop(self._turns)

    def first(self) -> RoutedGroup:
        """Returns the next group without removing it; the queue must not be empty."""
        if self._front:
            return self._front[0]
        return next(iter(self._callers[self._next()].groups.values()))

    def pop(self) -> RoutedGroup:
        """Removes and returns the next group."""
        if self._front:
            group = self._front.popleft()
            self._uncount(group)
            return group
        key = self._next()
        caller = self._callers[key]
        _, group = caller.groups.popitem(last=False)
        heapq.heappop(self._turns)
        self._now[group.priority] = caller.turn
        caller.turn += self._uncount(group)
        if caller.groups:
            self._enter(key)
        else:
            self._leave(key)
        return group

    def _leave(self, key: Key) -> None:
        """Removes a caller with nothing left waiting."""
        self._absent_turns[key] = self._callers.pop(key).turn
        if len(self._absent_turns) > MAX_ABSENT:
            self._absent_turns = {key: turn for key, turn in self._absent_turns.items() if turn > self._now[key[0]]}
            kept = {priority for priority, _ in (*self._callers, *self._absent_turns)}
            self._now = defaultdict(float, {each: turn for each, turn in self._now.items() if each in kept})

    def withdraw(self, caller: str, group_ids: Sequence[int]) -> None:
        """Drops groups of a caller."""
        if self._front:
            withdrawn = set(group_ids)
            for group in self._front:
                if group.id in withdrawn:
                    self._uncount(group)
            self._front = deque(group for group in self._front if group.id not in withdrawn)
        for key in [key for key in self._callers if key[1] == caller]:
            self._withdraw(key, group_ids)

    def _withdraw(self, key: Key, group_ids: Sequence[int]) -> None:
        queued = self._callers[key]
        # Groups that wait here are whole: parts of split groups are in front.
        for group_id in group_ids:
            if (group_id, 0) in queued.groups:
                self._uncount(queued.groups.pop((group_id, 0)))
        if not queued.groups:
            self._leave(key)
            self._turns = [entry for entry in self._turns if entry[3] in self._callers]
            heapq.heapify(self._turns)

    def clear(self) -> list[RoutedGroup]:
        """Removes and returns all groups."""
        groups = list(self._front)
        for caller in self._callers.values():
            groups.extend(caller.groups.values())
        self._front.clear()
        self._callers.clear()
        self._turns.clear()
        self._costs.clear()
        self._length, self.tokens = 0, 0.0
        return groups
