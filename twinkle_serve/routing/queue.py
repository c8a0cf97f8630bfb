"""Groups that no engine has yet, in the order in which they are to be sent."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from twinkle_serve.data_format.groups import Group, GroupKey


@dataclass(slots=True)
class _Caller:
    groups: OrderedDict[GroupKey, Group] = field(default_factory=OrderedDict)
    turn: float = 0.0
    """Tokens that were sent for it: the caller with the fewest is next."""


MAX_LEFT = 1000
"""Callers without anything waiting whose turns are remembered before those that are past are forgotten."""


class FairQueue:
    """Callers take turns by tokens; each one's groups go in the order in which they came.

    Guarantees: a caller waits for no more than what each other one has sent at a time, however much they have waiting.
    Guarantees: what was put in front is next, whosever it is.

    Source: start-time fair queueing (Goyal et al., 1996), each caller of the same weight.
    """

    def __init__(self, cost: Callable[[Group], float]) -> None:
        """
        Args:
            cost: of a group, in tokens.
        """
        self._cost = cost
        self._front: deque[Group] = deque()
        self._callers: dict[str, _Caller] = {}
        """Those that have something waiting."""
        self._turns: list[tuple[float, int, str]] = []
        """Heap of the callers: turn, a tie-breaker, name."""
        self._turns_left: dict[str, float] = {}
        """Of callers that have nothing waiting, where it may lie ahead of `_now`."""
        self._now = 0.0
        """Turn of the caller that was served last."""
        self._entries = 0
        self._length = 0
        self.tokens = 0.0
        """What waits costs so much, as it was guessed when it came."""
        self._costs: dict[GroupKey, float] = {}

    def __len__(self) -> int:
        return self._length

    def extend(self, groups: Iterable[Group]) -> None:
        """Adds groups at the end of their callers' queues."""
        for group in groups:
            caller = self._callers.get(group.caller)
            if caller is None:
                # One that was away has saved nothing up, and owes what it owed.
                turn = max(self._now, self._turns_left.pop(group.caller, 0.0))
                caller = self._callers[group.caller] = _Caller(turn=turn)
                self._enter(group.caller)
            caller.groups[group.key] = group
            self._count(group)

    def extend_front(self, groups: Iterable[Group]) -> None:
        """Puts groups in front of all others, the first one first."""
        groups = list(groups)
        self._front.extendleft(reversed(groups))
        for group in groups:
            self._count(group)

    def _count(self, group: Group) -> None:
        self._length += 1
        self._costs[group.key] = cost = self._cost(group)
        self.tokens += cost

    def _uncount(self, group: Group) -> float:
        self._length -= 1
        cost = self._costs.pop(group.key)
        self.tokens = self.tokens - cost if self._length else 0.0
        return cost

    def _enter(self, name: str) -> None:
        self._entries += 1
        heapq.heappush(self._turns, (self._callers[name].turn, self._entries, name))

    def _next(self) -> str:
        """The caller whose turn it is; there must be one."""
        while True:
            turn, _, name = self._turns[0]
            caller = self._callers.get(name)
            if caller is not None and caller.turn == turn and caller.groups:
                return name
            heapq.heappop(self._turns)

    def first(self) -> Group:
        """The next group, which stays; there must be one."""
        if self._front:
            return self._front[0]
        return next(iter(self._callers[self._next()].groups.values()))

    def pop(self) -> Group:
        """Takes the next group."""
        if self._front:
            group = self._front.popleft()
            self._uncount(group)
            return group
        name = self._next()
        caller = self._callers[name]
        _, group = caller.groups.popitem(last=False)
        heapq.heappop(self._turns)
        self._now = caller.turn
        caller.turn += self._uncount(group)
        if caller.groups:
            self._enter(name)
        else:
            self._leave(name)
        return group

    def _leave(self, name: str) -> None:
        """A caller has nothing waiting any more."""
        self._turns_left[name] = self._callers.pop(name).turn
        if len(self._turns_left) > MAX_LEFT:
            self._turns_left = {name: turn for name, turn in self._turns_left.items() if turn > self._now}

    def withdraw(self, caller: str, group_ids: Sequence[int]) -> None:
        """Drops groups of a caller."""
        if self._front:
            gone = set(group_ids)
            for group in self._front:
                if group.id in gone:
                    self._uncount(group)
            self._front = deque(group for group in self._front if group.id not in gone)
        if (theirs := self._callers.get(caller)) is None:
            return
        # A group that waits here has not been cut into parts: those are in front.
        for group_id in group_ids:
            if (group_id, 0) in theirs.groups:
                self._uncount(theirs.groups.pop((group_id, 0)))
        if not theirs.groups:
            self._leave(caller)
            self._turns = [entry for entry in self._turns if entry[2] in self._callers]
            heapq.heapify(self._turns)

    def clear(self) -> list[Group]:
        """Takes all."""
        groups = list(self._front)
        for caller in self._callers.values():
            groups.extend(caller.groups.values())
        self._front.clear()
        self._callers.clear()
        self._turns.clear()
        self._costs.clear()
        self._length, self.tokens = 0, 0.0
        return groups
