"""Finds the groups that may have ended an engine. Free of Ray, clock and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from twinkle_serve.data_format.groups import GroupKey
from twinkle_serve.errors import PoisonPromptError
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.resume import rejoin

SUSPECT_AFTER = 2
"""A group is a suspect after this many of its engines ended, apparently killed from outside; a suspect is placed on an
engine without another suspect. A crash makes suspects of all groups on the engine."""
MAX_CRASHES = 2
MAX_ENGINES_LOST = 5
"""A suspect is poisoned when its engine ends and this many engines crashed, or ended in any way, while it ran on them.
Engines that were killed from outside may be accidents."""
CLEARED_AFTER_S = 1.0
"""A suspect is cleared after running this much longer than it had on the engine that ended."""
MAX_SUSPICION_S = 10.0
"""Upper limit: all groups of a crashed engine take turns as suspects, so each turn must be short."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The groups of an engine that ended, classified."""

    innocent: list[RoutedGroup] = field(default_factory=list)
    suspects: list[RoutedGroup] = field(default_factory=list)
    """Shortest running time first: a poisoned group mostly ends its engine at the first step."""
    poisoned: list[RoutedGroup] = field(default_factory=list)


def classify(name: str, suspect: GroupKey | None, lost: Sequence[RoutedGroup], *, crashed: bool) -> Verdict:
    """Classifies the groups of an engine that ended.

    With a suspect on it, only groups that had lost an engine before may have ended it; without one, any group may have.
    The suspect is poisoned if no other group comes into question: a group that was cleared may have needed longer to
    end its engine this time.

    Args:
        name: name of the engine.
        suspect: key of the suspect on it.
        lost: its unfinished groups.
        crashed: whether it ended by itself, rather than from outside.
    """
    marked = {group.id for group in lost if group.lost}
    alone = suspect is not None and marked <= {suspect[0]}
    verdict = Verdict()
    suspects = []
    for group in lost:
        if suspect is not None and group.id not in marked:
            verdict.innocent.append(group)
            continue
        group = replace(group, lost=(*group.lost, name), crashes=group.crashes + crashed)
        if alone and (group.crashes >= MAX_CRASHES or len(group.lost) >= MAX_ENGINES_LOST):
            verdict.poisoned.append(group)
        elif group.crashes or len(group.lost) >= SUSPECT_AFTER:
            suspects.append(group)
        else:
            verdict.innocent.append(group)
    verdict.suspects.extend(sorted(rejoin(suspects), key=lambda group: group.ran_s))
    return verdict


def suspicion_s(group: RoutedGroup) -> float:
    """Seconds until a suspect is cleared, unless it ends before."""
    return min(group.ran_s, MAX_SUSPICION_S) + CLEARED_AFTER_S


def describe_prompt(group: RoutedGroup) -> str:
    """Describes a prompt in its caller's terms."""
    first = ", ".join(map(str, group.prompt_ids[:8].tolist()))
    more = ", …" if len(group.prompt_ids) > 8 else ""
    return f"inputs[{group.input}] ({len(group.prompt_ids)} tokens: {first}{more})"


def poison_error(group: RoutedGroup) -> PoisonPromptError:
    """The error of a poisoned group."""
    return PoisonPromptError(
        f"{describe_prompt(group)} was on {', '.join(group.lost)} when they ended, the last time as the only suspect. "
        "Leave it out, or see those engines' logs."
    )
