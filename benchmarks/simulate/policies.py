"""The service's policy, and simpler ones to compare it with."""

from __future__ import annotations

import random
from typing import Literal, TypeAlias, get_args

from twinkle_serve.data_format.groups import Group
from twinkle_serve.routing.policies import Balanced, EngineLoad, Policy

PolicyName: TypeAlias = Literal["balanced", "round_robin", "static"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


def build_policy(name: PolicyName, prompts: int, rng: random.Random) -> Policy:
    """Builds a policy for a call of `prompts` prompts, with group ids 0 to prompts - 1."""
    match name:
        case "balanced":
            return Balanced(rng)
        case "round_robin":
            return RoundRobin()
        case "static":
            return Static(prompts)


class RoundRobin:
    """Places each group on the next engine at once, whatever its load."""

    def __init__(self) -> None:
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
    """Splits the prompts of a call into one slice per engine, in order, as Twinkle's sampler does."""

    def __init__(self, prompts: int) -> None:
        """
        Args:
            prompts: number of prompts of the call; their group ids are 0 to prompts - 1.
        """
        self._prompts = prompts
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
        return engines[group.id * len(engines) // self._prompts]
