"""Which of the groups that an engine had when it ended may have ended it. Free of Ray, clock and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from twinkle_serve.data_format.groups import Group, GroupKey
from twinkle_serve.errors import PoisonPromptError
from twinkle_serve.routing.resume import rejoined

SUSPECT_AFTER = 2
"""Engines that ended with a group on them, from outside as it seems, after which it is a suspect: it is sent to an
engine that has no other one. One that ended by itself makes suspects of all that it had."""
MAX_CRASHES = 2
MAX_ENGINES_LOST = 5
"""A suspect is poisoned when its engine ends and this many engines crashed, or ended in any way, while it ran on them.
Engines that were ended from outside may be accidents."""
CLEARED_AFTER_S = 1.0
"""A suspect is cleared when it has run for so much longer than it had on the engine that ended."""
MAX_SUSPICION_S = 10.0
"""All that was on an engine that crashed takes its turn as a suspect, so that each must be short."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of the groups of an engine that ended."""

    innocent: list[Group] = field(default_factory=list)
    suspects: list[Group] = field(default_factory=list)
    """Those first that had run for the shortest time: what ends an engine does so at its first step, mostly."""
    poisoned: list[Group] = field(default_factory=list)


def classify(name: str, suspect: GroupKey | None, lost: Sequence[Group], *, crashed: bool) -> Verdict:
    """Where a suspect was on the engine, only what had lost an engine before may have ended it; else any of it.

    The suspect is poisoned if nothing else can have been: one that was cleared may need longer than the time before.

    Args:
        name: of the engine.
        suspect: the group that was under suspicion there.
        crashed: whether it ended by itself.
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
    verdict.suspects.extend(sorted(rejoined(suspects), key=lambda group: group.ran_s))
    return verdict


def suspicion_s(group: Group) -> float:
    """For how long a suspect keeps others from its engine, unless it ends before."""
    return min(group.ran_s, MAX_SUSPICION_S) + CLEARED_AFTER_S


def named(group: Group) -> str:
    """A prompt, as its caller knows it."""
    first = ", ".join(map(str, group.prompt_ids[:8].tolist()))
    more = ", …" if len(group.prompt_ids) > 8 else ""
    return f"inputs[{group.input}] ({len(group.prompt_ids)} tokens: {first}{more})"


def poison_error(group: Group) -> PoisonPromptError:
    """What a poisoned group fails by."""
    return PoisonPromptError(
        f"{named(group)} was on {', '.join(group.lost)} when they ended, the last time as the only suspect. "
        "Leave it out, or see those engines' logs."
    )
