"""Which group goes where: nothing lost, nothing twice, nobody idle."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.routing.dispatch import HEADROOM, Dispatcher
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.policies import Balanced
from twinkle_serve.routing.seeds import SPACING, prompt_seed

PARAMS = DecodingParams()


def group(number: int, count: int = 1, seed: int | None = None) -> RoutedGroup:
    return RoutedGroup(id=number, prompt_ids=np.zeros(1, np.int32), params=PARAMS, count=count, seed=seed)


def bound(number: int, engine: str, count: int = 1) -> RoutedGroup:
    return replace(group(number, count), engine=engine)


def dispatcher(engines: dict[str, int]) -> Dispatcher:
    made = Dispatcher(Balanced(random.Random(0)))
    for name, slots in engines.items():
        made.add_engine(name, slots)
    return made


def samples(chunks: dict[str, list[RoutedGroup]]) -> Counter[tuple[int, int]]:
    """(group, sample) to how often it was placed."""
    parts = [part for chunk in chunks.values() for part in chunk]
    return Counter((p.id, p.first_sample + j) for p in parts for j in range(p.count))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
    st.lists(st.integers(1, 32), min_size=1, max_size=5),
    st.data(),
)
def test_every_sample_is_placed_once_whatever_the_engines(counts: list[int], slots: list[int], data: Any) -> None:
    """Any sizes, any order of finishing, an engine lost halfway: each sample runs once, within every limit."""
    made = dispatcher({f"e{i}": n for i, n in enumerate(slots)})
    limits = {f"e{i}": max(1, int(n * HEADROOM)) for i, n in enumerate(slots)}
    made.enqueue(group(i, count, seed=1000 * i) for i, count in enumerate(counts))
    running: dict[str, list[RoutedGroup]] = {name: [] for name in limits}
    done: Counter[tuple[int, int]] = Counter()
    may_lose = len(slots) > 1
    while True:
        for name, chunk in made.assign().items():
            running[name].extend(chunk)
            assert sum(part.count for part in running[name]) <= limits[name]
            assert all(part.seed == 1000 * part.id + part.first_sample for part in chunk)
        busy = [name for name, chunk in running.items() if chunk]
        if not busy:
            break
        name = data.draw(st.sampled_from(busy))
        if may_lose and data.draw(st.booleans()):
            may_lose = False
            lost = made.remove_engine(name)
            assert sorted(part.key for part in lost) == sorted(part.key for part in running.pop(name))
            made.enqueue(lost, first=True)
            continue
        part = running[name].pop(data.draw(st.integers(0, len(running[name]) - 1)))
        made.finish(name, [part.key])
        done += samples({name: [part]})
    assert made.waiting == 0
    assert done == Counter({(i, j): 1 for i, count in enumerate(counts) for j in range(count)})


def test_group_stays_together_when_there_is_work_for_all() -> None:
    """A prompt's samples share its prefix."""
    made = dispatcher({"a": 64, "b": 64})
    made.enqueue(group(i, 8) for i in range(8))
    chunks = made.assign()
    assert all(part.count == 8 for chunk in chunks.values() for part in chunk)
    assert {name: len(chunk) for name, chunk in chunks.items()} == {"a": 4, "b": 4}


def test_group_is_shared_out_when_engines_idle() -> None:
    """One prompt of 8 samples on 4 engines: 2 each."""
    made = dispatcher(dict.fromkeys("abcd", 64))
    made.enqueue([group(0, 8, seed=50)])
    chunks = made.assign()
    assert {name: [part.count for part in chunk] for name, chunk in chunks.items()} == {n: [2] for n in "abcd"}
    assert samples(chunks) == Counter({(0, j): 1 for j in range(8)})


def test_engine_is_not_sent_what_it_cannot_start_soon() -> None:
    """The rest waits for whoever is free first."""
    made = dispatcher({"a": 8, "b": 8})
    made.enqueue(group(i) for i in range(100))
    chunks = made.assign()
    assert sum(len(chunk) for chunk in chunks.values()) == 2 * int(8 * HEADROOM)
    assert made.waiting == 100 - 2 * int(8 * HEADROOM)
    assert made.assign() == {}
    made.finish("b", [chunks["b"][0].key])
    assert list(made.assign()) == ["b"]


def test_group_of_one_engine_waits_for_it() -> None:
    """While it is away, closed or full; other groups pass it, and it passes none of its own."""
    made = dispatcher({"a": 4, "b": 4})
    made.close_engine("b")
    made.enqueue([bound(0, "b"), bound(1, "b", 5), bound(2, "c"), group(3)])
    assert {name: [part.id for part in chunk] for name, chunk in made.assign().items()} == {"a": [3]}
    assert made.waiting == 3
    made.open_engine("b")
    assert {name: [part.id for part in chunk] for name, chunk in made.assign().items()} == {"b": [0]}
    made.finish("b", [(0, 0)])
    assert {name: [part.id for part in chunk] for name, chunk in made.assign().items()} == {"b": [1]}
    made.enqueue(made.remove_engine("b"), first=True)
    assert made.assign() == {} and made.waiting == 2
    made.withdraw("", [2])
    made.add_engine("b", 4)
    made.add_engine("c", 4)
    assert {name: [part.id for part in chunk] for name, chunk in made.assign().items()} == {"b": [1]}
    made.enqueue([bound(4, "d")])
    assert [each.id for each in made.withdraw_waiting()] == [4] and made.waiting == 0


def test_suspect_of_one_engine_waits_for_it() -> None:
    made = dispatcher({"a": 4})
    made.suspect(bound(0, "b"))
    made.suspect(group(1))
    assert {name: [part.id for part in chunk] for name, chunk in made.assign().items()} == {"a": [1]}
    made.add_engine("b", 4)
    assert {name: [part.id for part in chunk] for name, chunk in made.assign().items()} == {"b": [0]}


def test_lone_prompts_do_not_all_go_to_the_first_engine() -> None:
    """Among equals it is the one that has had nothing for longest, and where that begins is left to chance."""
    made = dispatcher({"a": 8, "b": 8, "c": 8})
    seen: Counter[str] = Counter()
    for i in range(300):
        made.enqueue([group(i)])
        ((name, (part,)),) = made.assign().items()
        made.finish(name, [part.key])
        seen[name] += 1
    assert set(seen.values()) == {100}
    firsts: set[str] = set()
    for seed in range(20):
        made = Dispatcher(Balanced(random.Random(seed)))
        for name in "abc":
            made.add_engine(name, 8)
        made.enqueue([group(0)])
        firsts |= made.assign().keys()
    assert firsts == set("abc")


def test_withdrawn_groups_are_not_placed() -> None:
    """Those that engines hold are named; the others are gone."""
    made = dispatcher({"a": 4})
    made.enqueue(group(i) for i in range(10))
    held = made.assign()["a"]
    assert made.withdraw("", range(3, 10)) == {"a": [part for part in held if part.id >= 3]}
    for part in held:
        made.finish("a", [part.key])
    assert made.assign() == {}
    assert made.sequences("a") == 0


def test_lost_engine_does_not_look_busy_when_it_comes_back() -> None:
    """It starts empty."""
    made = dispatcher({"a": 4})
    made.enqueue([group(0)])
    made.assign()
    assert [part.id for part in made.remove_engine("a")] == [0]
    assert made.engines == []
    made.add_engine("a", 4)
    assert made.sequences("a") == 0


def test_nothing_is_placed_without_engines() -> None:
    """Groups wait."""
    made = dispatcher({})
    made.enqueue([group(0)])
    assert made.assign() == {}
    assert made.waiting == 1


@given(st.integers(0, 2**62 - 1), st.integers(0, 10_000))
def test_prompt_seeds_leave_room_for_every_sample(seed: int, index: int) -> None:
    """In the range that engines take, and apart from the prompts and requests beside them."""
    base = prompt_seed(seed, index)
    assert base >= 0 and base + SPACING <= 2**62
    others = {prompt_seed(seed, index + 1), prompt_seed((seed + 1) % 2**62, index)}
    assert all(abs(base - other) >= SPACING for other in others)
