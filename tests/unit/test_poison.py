"""Who may have ended an engine."""

from __future__ import annotations

import numpy as np

from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.poison import MAX_ENGINES_LOST, classify


def group(number: int, lost: tuple[str, ...] = (), crashes: int = 0, ran_s: float = 0.0) -> RoutedGroup:
    return RoutedGroup(
        id=number, prompt_ids=np.zeros(1, np.int32), params=DecodingParams(), lost=lost, crashes=crashes, ran_s=ran_s
    )


def test_engine_that_was_killed_once_makes_no_suspects() -> None:
    """It may happen to any; the second time may be no accident."""
    first = classify("a", None, [group(1), group(2)], crashed=False)
    assert [each.lost for each in first.innocent] == [("a",), ("a",)] and not first.suspects
    second = classify("b", None, first.innocent, crashed=False)
    assert [each.lost for each in second.suspects] == [("a", "b"), ("a", "b")] and not second.innocent


def test_engine_that_crashed_makes_suspects_of_all_the_youngest_first() -> None:
    """What ends an engine mostly does so at once."""
    verdict = classify("a", None, [group(1, ran_s=5.0), group(2, ran_s=0.1)], crashed=True)
    assert [each.id for each in verdict.suspects] == [2, 1] and not verdict.innocent + verdict.poisoned


def test_suspect_alone_is_guilty_at_its_second_crash() -> None:
    """What is beside it and has lost no engine had no part in it."""
    verdict = classify("b", (1, 0), [group(1, ("a",), crashes=1), group(2)], crashed=True)
    assert [each.id for each in verdict.poisoned] == [1]
    assert [(each.id, each.lost) for each in verdict.innocent] == [(2, ())]


def test_suspect_is_not_guilty_while_another_may_be() -> None:
    """One that was cleared before is on the engine too: both are suspects again, and neither fails."""
    verdict = classify("b", (1, 0), [group(1, ("a",), crashes=1), group(2, ("a",), crashes=1)], crashed=True)
    assert {each.id for each in verdict.suspects} == {1, 2} and not verdict.poisoned


def test_suspect_whose_engines_were_killed_is_guilty_late() -> None:
    """Accidents meet the same group more than twice where engines are killed often."""
    killed = tuple("abcd")
    assert len(killed) == MAX_ENGINES_LOST - 1
    assert not classify("e", (1, 0), [group(1, killed[:-1])], crashed=False).poisoned
    assert [each.id for each in classify("e", (1, 0), [group(1, killed)], crashed=False).poisoned] == [1]
