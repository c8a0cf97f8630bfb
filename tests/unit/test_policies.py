"""Which engine a group goes to, by each policy."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.groups import Group
from twinkle_serve.routing.dispatch import Dispatcher
from twinkle_serve.routing.policies import BLOCK, POLICIES, Lengths, PolicyName

RNG = np.random.default_rng(0)


def ids(length: int) -> np.ndarray:
    return RNG.integers(0, 1000, length).astype(np.int32)


def group(number: int, prompt: np.ndarray | None = None, **options: Any) -> Group:
    params = SamplingParams(max_tokens=options.pop("max_tokens", 64))
    return Group(id=number, prompt_ids=ids(8) if prompt is None else prompt, params=params, **options)


def dispatcher(policy: PolicyName, engines: dict[str, int]) -> Dispatcher:
    made = Dispatcher(policy, rng=random.Random(0))
    for name, slots in engines.items():
        made.add_engine(name, slots)
    return made


def placed(made: Dispatcher, groups: list[Group]) -> dict[int, set[str]]:
    """Engines by group."""
    made.enqueue(groups)
    found: dict[int, set[str]] = {}
    for name, chunk in made.assign().items():
        for part in chunk:
            found.setdefault(part.id, set()).add(name)
    return found


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy_uses_every_engine_and_survives_their_loss(policy: PolicyName) -> None:
    """A call of 64 prompts, an engine that goes, another that comes."""
    made = dispatcher(policy, dict.fromkeys("abcd", 64))
    groups = [group(i, index=i, prompts=64) for i in range(64)]
    assert Counter(name for names in placed(made, groups).values() for name in names) == dict.fromkeys("abcd", 16)
    lost = made.remove_engine("b")
    made.enqueue(lost, first=True)
    assert {name for name, chunk in made.assign().items() if chunk} <= set("acd")
    for name in "acd":
        made.finish(name, [part.key for part in groups])
    made.add_engine("e", 64)
    assert {name for names in placed(made, groups).values() for name in names} == set("acde")


def test_static_cuts_a_call_into_slices_in_order() -> None:
    """As upstream does, whatever the engines have to do already."""
    made = dispatcher("static", dict.fromkeys("abcd", 1))
    for first in (0, 100):
        found = placed(made, [group(first + i, index=i, prompts=8) for i in range(8)])
        assert [found[first + i] for i in range(8)] == [{name} for name in "aabbccdd"]


def test_round_robin_takes_turns() -> None:
    """Also past what an engine can hold."""
    made = dispatcher("round_robin", dict.fromkeys("abc", 1))
    found = placed(made, [group(i) for i in range(9)])
    assert [found[i] for i in range(9)] == [found[i % 3] for i in range(9)]
    assert Counter(name for (name,) in found.values()) == dict.fromkeys("abc", 3)


def test_balanced_counts_tokens_and_not_prompts() -> None:
    """An engine with one long sample has as much to do as one with ten short ones."""
    made = dispatcher("balanced", {"a": 64, "b": 64})
    made.learn(np.full(1000, 1000, np.int32))
    (long,) = placed(made, [group(0, max_tokens=1000)])[0]
    found = placed(made, [group(1 + i, max_tokens=50) for i in range(10)])
    assert {name for names in found.values() for name in names} == set("ab") - {long}


def test_expected_length_is_what_samples_had() -> None:
    """And never more than a request allows."""
    lengths = Lengths()
    assert lengths.cost(group(0, max_tokens=100), 1) == pytest.approx(100 + 0.05 * 8)
    lengths.learn(np.full(5000, 40, np.int32))
    assert lengths.cost(group(0, max_tokens=100), 2) == pytest.approx(80, rel=0.1)
    assert lengths.cost(group(0, max_tokens=10), 2) == pytest.approx(20, rel=0.1)


def test_conversation_goes_where_it_was_until_that_engine_is_far_behind() -> None:
    """A prompt that begins with a whole earlier one; then it moves, and stays where it has moved to."""
    made = dispatcher("balanced", {"a": 16, "b": 16})
    first = ids(4 * BLOCK)
    (home,) = placed(made, [group(0, first)])[0]
    made.finish(home, [(0, 0)])
    other = ({"a", "b"} - {home}).pop()
    for turn in range(1, 6):  # by turns with prompts that have nothing in common with it
        placed(made, [group(100 + turn)])
        first = np.concatenate([first, ids(40)])
        assert placed(made, [group(turn, first)])[turn] == {home}
        for name in "ab":
            made.finish(name, [(turn, 0), (100 + turn, 0)])
    made.enqueue(group(200 + i) for i in range(24))
    chunks = made.assign()
    made.finish(other, [part.key for part in chunks[other]])  # and the home is left with twelve
    first = np.concatenate([first, ids(40)])
    assert placed(made, [group(6, first)])[6] == {other}
    made.finish(other, [(6, 0)])
    made.finish(home, [part.key for part in chunks[home]])
    assert placed(made, [group(7, np.concatenate([first, ids(40)]))])[7] == {other}


def test_system_prompt_that_all_share_draws_nobody_together() -> None:
    """What is less than half of a prompt is no conversation."""
    made = dispatcher("balanced", dict.fromkeys("abcd", 64))
    system = ids(2 * BLOCK)
    found = placed(made, [group(i, np.concatenate([system, ids(3 * BLOCK)])) for i in range(64)])
    assert Counter(name for names in found.values() for name in names) == dict.fromkeys("abcd", 16)
