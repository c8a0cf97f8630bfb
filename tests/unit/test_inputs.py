"""Inputs of a call, packed by the caller."""

from __future__ import annotations

import pickle
import threading
from collections import UserDict, deque
from typing import Any

import numpy as np
import pytest

from twinkle_serve.data_format.inputs import PIECE, PackedInputs, as_list
from twinkle_serve.errors import PromptError

COUNT = 2 * PIECE + 3


def test_inputs_arrive_unchanged() -> None:
    """In order, even if the caller changes them meanwhile; and again, if they are sent again."""
    inputs: list[dict[str, Any]] = [{"input_ids": np.arange(i + 1), "user_data": {"id": i}} for i in range(COUNT)]
    packed = PackedInputs.of(inputs, pickle.Pickler)
    inputs[0]["user_data"]["id"] = 99
    inputs.pop()
    for _ in range(2):
        sent = pickle.loads(pickle.dumps(packed))
        items = as_list(sent)
        assert items is not None and len(sent) == len(items) == COUNT
        assert [item["user_data"]["id"] for item in items] == list(range(COUNT))
        assert [len(item["input_ids"]) for item in items] == list(range(1, COUNT + 1))


def test_objects_shared_by_inputs_are_sent_once() -> None:
    """They arrive as one object; all inputs may refer to one long text or table."""
    table = np.zeros(100_000)
    packed = PackedInputs.of([{"input_ids": [i], "user_data": table} for i in range(COUNT)], pickle.Pickler)
    assert len(pickle.dumps(packed)) < 1.1 * table.nbytes
    items = packed.to_list()
    assert items[0]["user_data"] is items[-1]["user_data"]


@pytest.mark.parametrize("inputs", [[{"input_ids": [1]}], ({"input_ids": [1]},), deque([{"input_ids": [1]}])])
def test_any_sequence_is_a_list_of_inputs(inputs: Any) -> None:
    """Its items are the inputs."""
    assert as_list(inputs) == [{"input_ids": [1]}]


@pytest.mark.parametrize("one", [{"input_ids": [1]}, UserDict({"input_ids": [1]})])
def test_a_mapping_is_one_input(one: Any) -> None:
    """Its keys are not inputs."""
    assert as_list(one) == [one]


@pytest.mark.parametrize("none", ["text", b"text", None, 3, np.zeros(2)])
def test_other_types_are_not_inputs(none: Any) -> None:
    """Text is not accepted either."""
    assert as_list(none) is None


class OfTheCaller:
    """A class that the service cannot unpickle."""

    def __reduce__(self) -> Any:
        return int, ("x",)


def test_inputs_that_cannot_be_sent_or_read_are_refused() -> None:
    """The message says which inputs, and what to send instead."""
    inputs: list[dict[str, Any]] = [{"input_ids": [i]} for i in range(PIECE + 3)]
    inputs[-1]["user_data"] = OfTheCaller()
    packed = PackedInputs.of(inputs, pickle.Pickler)
    with pytest.raises(PromptError, match=r"inputs\[16:19\] cannot be read: ValueError.*plain dicts"):
        as_list(packed)
    inputs[1]["user_data"] = threading.Lock()
    with pytest.raises(PromptError, match=r"inputs\[0:16\] cannot be sent: TypeError.*plain dicts"):
        PackedInputs.of(inputs, pickle.Pickler)
