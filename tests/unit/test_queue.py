"""Callers take turns by tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.queue import FairQueue

PARAMS = DecodingParams()


def group(number: int, caller: str, count: int = 1, priority: int = 0) -> RoutedGroup:
    prompt = np.zeros(1, np.int32)
    return RoutedGroup(id=number, prompt_ids=prompt, params=PARAMS, count=count, caller=caller, priority=priority)


def queue() -> FairQueue:
    """A group costs as many tokens as it has samples."""
    return FairQueue(lambda group: float(group.count))


def test_caller_with_much_waiting_does_not_keep_others() -> None:
    """One with a few prompts is served in between."""
    made = queue()
    made.extend(group(i, "large") for i in range(1000))
    made.extend(group(2000 + i, "small") for i in range(3))
    first = [made.pop().caller for _ in range(6)]
    assert Counter(first) == {"large": 3, "small": 3}


def test_groups_of_a_lower_number_leave_first() -> None:
    """Regardless of arrival and caller; callers of equal priority take turns, also later."""
    made = queue()
    made.extend(group(i, "a") for i in range(4))
    made.extend(group(10 + i, "b", priority=1) for i in range(2))
    made.extend(group(20 + i, "ac"[i % 2], priority=-1) for i in range(4))
    assert [made.pop().priority for _ in range(4)] == [-1] * 4
    made.extend([group(30, "b"), group(31, "d", priority=-5)])
    assert made.pop().id == 31
    assert sorted(made.pop().caller for _ in range(2)) == ["a", "b"], "b waits for one group of a's at most"
    assert [made.pop().priority for _ in range(len(made))] == [0, 0, 0, 1, 1]


def test_withdrawal_covers_a_callers_groups_of_every_priority() -> None:
    """And leaves other callers' alone."""
    made = queue()
    made.extend([group(1, "a", priority=2), group(2, "a"), group(3, "b", priority=2), group(4, "a", priority=2)])
    made.withdraw("a", [1, 2])
    assert ([made.pop().id for _ in range(len(made))], made.tokens) == ([4, 3], 0.0)


def test_callers_get_the_same_tokens_whatever_the_size_of_their_groups() -> None:
    """One group of ten for ten of one."""
    made = queue()
    made.extend(group(i, "wide", count=10) for i in range(100))
    made.extend(group(1000 + i, "narrow") for i in range(1000))
    served = Counter[str]()
    for _ in range(330):
        taken = made.pop()
        served[taken.caller] += taken.count
    assert abs(served["wide"] - served["narrow"]) <= 10


def test_caller_that_leaves_and_returns_has_saved_nothing_and_owes_what_it_owed() -> None:
    """One large group at a time does not starve those who wait in between."""
    made = queue()
    made.extend(group(i, "patient") for i in range(3000))
    served = Counter[str]()
    number = 10_000
    for _ in range(2000):
        if served["greedy"] == 0 or not any(name == "greedy" for _, name in made._callers):
            number += 1
            made.extend([group(number, "greedy", count=1000)])
        taken = made.pop()
        served[taken.caller] += taken.count
    assert served["patient"] >= 900 and served["greedy"] <= 3000


@given(st.data())
def test_every_group_comes_out_once_and_nothing_is_counted_that_is_gone(data: Any) -> None:
    """Whatever comes, is put in front, is withdrawn and is taken, in any order."""
    made = queue()
    inside: dict[int, RoutedGroup] = {}
    number = 0
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["extend", "front", "pop", "withdraw"])):
            case "extend" | "front" as where:
                new = [
                    group(number + i, data.draw(st.sampled_from("abc")), data.draw(st.integers(1, 5))) for i in range(3)
                ]
                number += 3
                inside |= {each.id: each for each in new}
                made.extend(new) if where == "extend" else made.extend_front(new)
            case "pop" if inside:
                assert made.first() is made.first()
                first = made.first()
                assert made.pop() is first
                del inside[first.id]
            case "withdraw" if inside:
                gone = inside.pop(data.draw(st.sampled_from(sorted(inside))))
                made.withdraw(gone.caller, [gone.id])
        assert len(made) == len(inside)
        assert made.tokens == sum(each.count for each in inside.values())
    assert sorted(each.id for each in made.clear()) == sorted(inside)
    assert len(made) == made.tokens == 0
