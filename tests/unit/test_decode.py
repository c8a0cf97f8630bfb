"""decode: the texts of token ids, by the service's tokenizer."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.local_sampler import QUESTION
from twinkle_serve import Template, hub
from twinkle_serve.data_format.token_lists import TokenLists, read_token_ids
from twinkle_serve.errors import PromptError
from twinkle_serve.sampler import RunningSampler

MAX_ID = 319
"""Of the demo model."""


def test_texts_are_those_of_the_samples(sampler: RunningSampler) -> None:
    """One text for a list of ids, a list for several; special tokens are kept or left out."""
    response = sampler.sample([QUESTION] * 40, {"max_tokens": 9}, num_samples=2)
    ids, texts = [s.tokens for s in response.sequences], [s.decoded for s in response.sequences]
    assert sampler.decode(ids) == texts and sampler.decode(ids[0]) == texts[0]
    assert sampler.decode([s.token_array for s in response.sequences]) == texts
    assert asyncio.run(sampler.decode_async(ids)) == texts and asyncio.run(sampler.decode_async(ids[0])) == texts[0]
    end = Template(hub.DEMO).tokenizer.eos_token_id
    assert sampler.decode([5, end]) == sampler.decode([5]) + sampler.decode([end])
    assert sampler.decode([[5, end], [end]], skip_special_tokens=True) == [sampler.decode([5]), ""]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], ""),
        ((), ""),
        ([[]], [""]),
        ([[], [5]], ["", "#"]),
        (range(5, 7), "#$"),
        (np.array([5, 6]), "#$"),
        (np.array([5, 6], np.uint8), "#$"),
        (np.array([]), ""),
        (torch.tensor([5, 6]), "#$"),
        (torch.tensor([]), ""),
        ([np.int64(5), np.int32(6)], "#$"),
        ([torch.tensor(5), torch.tensor(6)], "#$"),
        (np.array([5, 6], object), "#$"),
        (np.array([[5], [6]]), ["#", "$"]),
        (torch.tensor([[5], [6]]), ["#", "$"]),
        (np.empty((2, 0)), ["", ""]),
        (np.empty((0, 3), np.int64), []),
        (np.array([[5], [6, 7]], object), ["#", "$%"]),
        ([np.array([5]), torch.tensor([6, 7])], ["#", "$%"]),
        ([[MAX_ID]], [""]),
    ],
    ids=repr,
)
def test_ids_may_come_in_any_form(sampler: RunningSampler, ids: Any, expected: object) -> None:
    """Lists, arrays and tensors, of one list or several; an empty list has an empty text."""
    assert sampler.decode(ids) == asyncio.run(sampler.decode_async(ids)) == expected
    by_handle = sampler._client.loop.call(sampler._client._router.decode(ids))  # type: ignore[attr-defined]
    assert by_handle == expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (5, "token_ids must be a list of token ids, or a list of such lists, got 5"),
        (None, "token_ids must be a list"),
        ("ab", "token_ids must be a list"),
        (b"ab", "token_ids must be a list"),
        ({1, 2}, "token_ids must be a list"),
        ({"input_ids": [1]}, "token_ids must be a list"),
        (torch.tensor(3), "token_ids must be a list"),
        ([1, True], r"token_ids\[1\] must be a whole number, got True"),
        ([1, np.False_], r"token_ids\[1\] must be a whole number, got "),
        (np.array([True]), r"token_ids\[0\] must be a whole number, got True"),
        (torch.tensor([False]), r"token_ids\[0\] must be a whole number, got False"),
        ([[5], [1, True]], r"token_ids\[1\]\[1\] must be a whole number, got True"),
        ([1, 2.0], r"token_ids\[1\] must be a whole number, got 2.0"),
        (np.array([1.5]), r"token_ids\[0\] must be a whole number, got 1.5"),
        ([1, None], r"token_ids\[1\] must be a whole number, got None"),
        (["a"], r"token_ids\[0\] must be a whole number, got 'a'"),
        ([1, [2]], r"token_ids\[1\] must be a whole number, got \[2\]"),
        ([[1], 2], r"token_ids\[1\] must be a list of token ids, got 2"),
        ([[[1]]], r"token_ids\[0\]\[0\] must be a whole number, got \[1\]"),
        (np.zeros((1, 1, 1), int), r"token_ids\[0\]\[0\] must be a whole number, got \[0\]"),
        ([1, -1], r"token_ids\[1\] must be between 0 and \d+, got -1"),
        ([[1], [2, -2]], r"token_ids\[1\]\[1\] must be between 0 and \d+, got -2"),
        (torch.tensor([1, -3]), r"token_ids\[1\] must be between 0 and \d+, got -3"),
        ([2**31], r"token_ids\[0\] must be between 0 and \d+, got 2147483648"),
        ([2**70], r"token_ids\[0\] must be between 0 and \d+, got 1180591620717411303424"),
        (np.array([2**63], np.uint64), r"token_ids\[0\] must be between 0 and \d+, got 9223372036854775808"),
        ([5, MAX_ID + 1], rf"token_ids\[1\] must be between 0 and {MAX_ID}, got {MAX_ID + 1}"),
        ([[5], [MAX_ID + 1]], rf"token_ids\[1\]\[0\] must be between 0 and {MAX_ID}, got {MAX_ID + 1}"),
    ],
    ids=repr,
)
def test_what_is_no_id_is_refused_with_its_index(sampler: RunningSampler, ids: Any, message: str) -> None:
    """Also by handle, and when an async call is awaited; the next call works."""
    with pytest.raises(PromptError, match=f"^{message}"):
        sampler.decode(ids)
    call = sampler.decode_async(ids)
    with pytest.raises(PromptError, match=f"^{message}"):
        asyncio.run(call)
    with pytest.raises(PromptError, match=f"^{message}"):
        sampler._client.loop.call(sampler._client._router.decode(ids))  # type: ignore[attr-defined]
    assert sampler.decode([5]) == "#"


def test_error_of_a_tokenizer_is_refused_with_its_index(sampler: RunningSampler) -> None:
    """A template of a caller's own may raise anything."""
    sampler.set_template(Failing)
    with pytest.raises(PromptError, match=r"token_ids\[1\] cannot be decoded: IndexError: 6 is out of range"):
        sampler.decode([[5], [6]])


class Failing(Template):
    """A template that cannot decode 6."""

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        if 6 in ids:
            raise IndexError("6 is out of range")
        return ""


@given(lists=st.lists(st.lists(st.integers(0, 2**31 - 1))))
def test_token_lists_are_the_lists(lists: list[list[int]]) -> None:
    """However they are read, and pickled as one array."""
    arrays = [np.array(each, np.int32) for each in lists]
    joined = pickle.loads(pickle.dumps(TokenLists.of(arrays)))
    assert list(joined) == lists and len(joined) == len(lists) and joined[1:] == lists[1:]
    assert joined.lengths == [*map(len, lists)]
    assert [joined[i] for i in range(-len(lists), 0)] == lists
    for i in (len(lists), -len(lists) - 1):
        with pytest.raises(IndexError, match=f"list {i} of {len(lists)}"):
            joined[i]
    read, single = read_token_ids(joined)
    assert [each.tolist() for each in read] == lists and not single
    if lists:
        read, single = read_token_ids(lists)
        assert [each.tolist() for each in read] == lists and not single
