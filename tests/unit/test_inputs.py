"""Inputs of a call, packed by its caller."""

from __future__ import annotations

import pickle
import threading
from collections import deque
from typing import Any

import numpy as np
import pytest

from twinkle_serve.data_format.inputs import PIECE, PackedInputs, pack, unpacked
from twinkle_serve.errors import PromptError

COUNT = 2 * PIECE + 3


@pytest.fixture
def inputs() -> list[dict[str, Any]]:
    return [{"input_ids": np.arange(i + 1), "user_data": {"id": i}} for i in range(COUNT)]


def ids(made: Any) -> list[int]:
    return [item["user_data"]["id"] for item in made]


def test_inputs_arrive_as_they_were(inputs: list[dict[str, Any]]) -> None:
    """In their order, whatever their caller does to them meanwhile; and again, if they are sent again."""
    packed = pack(inputs, pickle.dumps)
    inputs[0]["user_data"]["id"] = 99
    inputs.pop()
    for _ in range(2):
        sent = pickle.loads(pickle.dumps(packed))
        assert len(sent) == COUNT and ids(unpacked(sent)) == ids(sent) == list(range(COUNT))
        assert [len(item["input_ids"]) for item in sent] == list(range(1, COUNT + 1))


def test_selected_inputs_are_the_callers_own(inputs: list[dict[str, Any]]) -> None:
    """A list of dicts, as far as a response's reader can tell; what is read twice is the same."""
    some = pack(inputs, pickle.dumps).select([COUNT - 1, 0, PIECE])
    assert ids(some) == [COUNT - 1, 0, PIECE] and len(some) == 3
    assert ids(some[1:]) == [0, PIECE] and ids(some[-1:]) == [PIECE]
    assert ids(some[1:].select([1])) == [PIECE]
    some[0]["reward"] = 1.0
    assert some[0]["reward"] == 1.0
    with pytest.raises(IndexError):
        some[3]


def test_selected_inputs_travel_alone(inputs: list[dict[str, Any]]) -> None:
    """A part of a response, sent on, does not take the whole call's inputs with it."""
    one = pack(inputs, pickle.dumps)[3:4]
    again = pickle.loads(pickle.dumps(one))
    assert type(again) is list and ids(again) == [3]


def test_one_dict_is_one_input() -> None:
    """As for the router; and any sequence will do."""
    for inputs in ({"input_ids": [1]}, deque([{"input_ids": [1]}])):
        packed = pack(inputs, pickle.dumps)
        assert isinstance(packed, PackedInputs) and unpacked(packed) == [{"input_ids": [1]}]


@pytest.mark.parametrize("none", [[], "text", None, 3, np.zeros(2)])
def test_what_is_no_input_goes_as_it_is(none: Any) -> None:
    """It is the router that refuses it, in its words."""
    assert pack(none, pickle.dumps) is none


def test_inputs_that_cannot_be_sent_are_refused() -> None:
    """Before anything is sent."""
    with pytest.raises(PromptError, match=r"cannot be sent to the service: TypeError.*lock"):
        pack([{"user_data": threading.Lock()}], pickle.dumps)


class OfTheCaller:
    """A class that the service cannot make."""

    def __reduce__(self) -> Any:
        return int, ("x",)


def test_inputs_that_cannot_be_read_are_refused() -> None:
    """With what to send instead."""
    packed = pack([{"user_data": OfTheCaller()}], pickle.dumps)
    with pytest.raises(PromptError, match=r"inputs\[0:16\] cannot be read in the service: ValueError.*plain dicts"):
        unpacked(packed)
