"""What engines are sent of a group."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np

from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.routing.groups import RoutedGroup


def test_engine_gets_every_field_of_a_group_and_no_bookkeeping() -> None:
    """Whatever fields there are."""
    values: dict[str, Any] = {field.name: object() for field in fields(Group)}
    sent = RoutedGroup(**values, caller="a", input=3, lost=("x",), crashes=1, ran_s=2.0).for_engine()
    assert type(sent) is Group
    assert {name: getattr(sent, name) for name in values} == values


def test_part_of_a_group_keeps_its_seeds_and_the_bookkeeping() -> None:
    """Wherever it is split."""
    whole = RoutedGroup(
        id=1, prompt_ids=np.zeros(1, np.int32), params=DecodingParams(), count=4, seed=100, lost=("x",), caller="a"
    )
    part = whole.part(1, 2)
    assert (part.seed, list(part.samples), part.lost, part.caller) == (101, [1, 2], ("x",), "a")


def test_groups_of_a_request_share_all_its_parameters_but_count_and_seed() -> None:
    """Those are each group's own."""
    params = SamplingParams(max_tokens=3, temperature=0.5, top_k=4, seed=6, stop="x", logprobs=None, num_samples=5)
    shared = asdict(DecodingParams.of(params))
    assert {name: shared[name] for name in ("max_tokens", "temperature", "top_k", "logprobs")} == {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_k": 4,
        "logprobs": None,
    }
    assert {field.name for field in fields(SamplingParams)} - shared.keys() == {
        *("stop", "num_samples", "seed", "seed_by", "priority"),
    }
    assert asdict(DecodingParams()) == asdict(DecodingParams.of(SamplingParams()))
    assert DecodingParams.of(params).stop_strings == ("x",) and DecodingParams(temperature=0).greedy
