"""Columns of a feature: each is as long as prompt and sample afterwards, or the feature is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.turns import after, feature_of, prompt_of
from twinkle_serve import hub
from twinkle_serve.errors import PromptError
from twinkle_serve.template import Template

IDS = [61, 62, 63]
USER = {"role": "user", "content": "1+1="}


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(hub.DEMO)


def sampled(template: Template, **columns: Any) -> dict[str, Any]:
    return feature_of(prompt_of({"input_ids": IDS, **columns}, template), template, "ab")


@pytest.mark.parametrize(
    ("position_ids", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ([0, 1, 2], [0, 1, 2, 3, 4]),
        (np.arange(3), [0, 1, 2, 3, 4]),
        ([[0, 1, 2]], [[0, 1, 2, 3, 4]]),
        (np.tile(np.arange(3), (3, 1)), [[0, 1, 2, 3, 4]] * 3),
        (torch.arange(3).expand(3, 1, 3), [[[0, 1, 2, 3, 4]]] * 3),
        (np.tile(np.arange(3), (4, 1)), [[0, 1, 2, 3, 4]] * 4),
    ],
)
def test_position_ids_grow_in_each_of_their_rows(position_ids: Any, expected: Any, template: Template) -> None:
    """Models of Qwen's vision family have three rows, for text alone as well."""
    assert sampled(template, position_ids=position_ids)["position_ids"] == expected


@pytest.mark.parametrize("key", ["token_type_ids", "mm_token_type_ids"])
@pytest.mark.parametrize(
    ("types", "expected"),
    [([0, 0, 0], [0] * 5), (np.zeros(3, np.int8), [0] * 5), (torch.zeros(1, 3, dtype=torch.int64), [[0] * 5])],
)
def test_types_of_tokens_grow(key: str, types: Any, expected: Any, template: Template) -> None:
    """With the type of text."""
    assert sampled(template, **{key: types})[key] == expected


def test_columns_grow_with_messages_too(template: Template) -> None:
    """Those of a second turn are as long as its ids, and are accepted again."""
    ids = prompt_of({"messages": [USER]}, template).ids
    columns = {"mm_token_type_ids": np.zeros((1, len(ids)), int), "position_ids": np.tile(np.arange(len(ids)), (3, 1))}
    feature: dict[str, Any] = {"messages": [USER], "input_ids": ids, **columns}
    for _ in range(3):
        feature = feature_of(prompt_of(feature, template), template, "2<|im_end|>")
        length = len(feature["input_ids"])
        assert np.shape(feature["mm_token_type_ids"]) == (1, length) == (1, feature["length"])
        assert feature["position_ids"] == [list(range(length))] * 3
        assert len(feature["labels"]) == len(feature["attention_mask"]) == length
        feature = after(feature, USER)


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"position_ids": [0, 1]}, "position_ids has shape (2,), input_ids (3,)"),
        ({"position_ids": [5, 6, 7]}, "position_ids must be 0 to 2"),
        ({"position_ids": [[0, 1, 2], [0, 1, 2], [0, 1, 9]]}, "position_ids must be 0 to 2"),
        ({"mm_token_type_ids": [0, 1, 0]}, "mm_token_type_ids must be 0, for text"),
        ({"mm_token_type_ids": [0, 0]}, "mm_token_type_ids has shape (2,)"),
        ({"token_type_ids": [[0, 0, 1]]}, "token_type_ids must be 0, for text"),
        ({"loss_mask": [0, 1, 1]}, "loss_mask has a dimension of 3 numbers, and input_ids 3 tokens"),
        ({"completion_mask": np.ones(3, bool)}, "completion_mask has a dimension of 3 numbers"),
        ({"old_logps": torch.zeros(3)}, "old_logps has a dimension of 3 numbers"),
        ({"routed_experts": np.zeros((3, 2, 4))}, "routed_experts has a dimension of 3 numbers"),
        ({"mask": torch.zeros(2, 3)}, "mask has a dimension of 3 numbers"),
        ({"rows": [[1, 2, 3], [4, 5, 6]]}, "rows has a dimension of 3 numbers"),
        ({"old_logps": [-0.5, -0.25]}, "old_logps has a dimension of 2 numbers, and input_ids 3 tokens"),
        ({"old_logps": np.zeros(4)}, "old_logps has a dimension of 4 numbers"),
        ({"hidden": np.zeros((6, 3, 8))}, "hidden has a dimension of 3 numbers"),
        ({"hidden": torch.zeros(6, 2, 8)}, "hidden has a dimension of 2 numbers"),
        ({"hidden": [[[1.0], [2.0], [3.0]]] * 7}, "hidden has a dimension of 3 numbers"),
        ({"scores": [None, -0.5, -0.25]}, "scores has a dimension of 3 numbers"),
        ({"scores": [{"61": -0.5}, {"62": -0.25}, None]}, "scores has a dimension of 3 numbers"),
        ({"scores": np.array([None, -0.5, -0.25], object)}, "scores has a dimension of 3 numbers"),
        ({"extra": {"values": [torch.zeros(3)] * 9}}, "extra has a dimension of 3 numbers"),
        ({"length": 2}, "length is 2, input_ids has 3 tokens"),
        ({"length": [3, 3]}, "length is [3, 3], input_ids has 3 tokens"),
        ({"length": "3"}, "length is '3', input_ids has 3 tokens"),
        ({"attention_mask": [1, 1]}, "attention_mask has shape (2,), input_ids (3,)"),
        ({"attention_mask": [1, 2, 1]}, "attention_mask must be 1 for each token, got 2"),
        ({"attention_mask": [1.0, 1.0, float("nan")]}, "attention_mask must be 1 for each token, got nan"),
        ({"attention_mask": ["1", "1", "0"]}, "attention_mask must be 1 for each token, got 1"),
        ({"position_ids": ["0", "1", "2"]}, "position_ids must be 0 to 2"),
        ({"position_ids": np.tile(np.arange(3), (3, 1)).T[:, :2]}, "position_ids has shape (3, 2)"),
        ({"audios": ["x.wav"]}, "audios: this service samples from text only"),
        ({"videos": np.array(["x.mp4"], object)}, "videos: this service samples from text only"),
        ({"input_features": np.ones((80, 10))}, "input_features: this service samples from text only"),
        ({"feature_attention_mask": [[1]]}, "feature_attention_mask: this service"),
        ({"video_grid_thw": [[1, 2, 2]]}, "video_grid_thw: this service"),
        ({"second_per_grid_ts": [1.0]}, "second_per_grid_ts: this service"),
        ({"audio_values": 1}, "audio_values: this service"),
        ({"multi_modal_data": {"image": "x"}}, "multi_modal_data: this service"),
        ({"mm_processor_kwargs": {"fps": 1}}, "mm_processor_kwargs: this service"),
    ],
)
def test_column_that_cannot_grow_is_refused(columns: dict[str, Any], error: str, template: Template) -> None:
    """By name, with the remedy, before anything is sampled."""
    with pytest.raises(PromptError) as caught:
        sampled(template, **columns)
    assert f"inputs[0].{error}" in str(caught.value) and "Leave it out" in str(caught.value)


def test_labels_that_are_not_rolled_are_refused(template: Template) -> None:
    """Rolled labels end with -100, because no token follows the last one. Another value would be lost."""
    with pytest.raises(PromptError, match=r"inputs\[0\].labels ends with 63, .* must be -100. Roll labels left"):
        sampled(template, labels=[-100, 62, 63])
    assert sampled(template, labels=[62, 63, -100])["labels"][:2] == [62, 63]


@pytest.mark.parametrize("length", [3, 3.0, np.int64(3), torch.tensor([3]), None])
def test_length_may_be_that_of_the_ids(length: Any, template: Template) -> None:
    """It is accepted as a number of any library, or as an array of one."""
    assert sampled(template, length=length)["length"] == 5


def test_audio_of_a_trajectory_is_refused(template: Template) -> None:
    """As its images are; an empty list is not."""
    for key in ("images", "videos", "audios", "audio"):
        with pytest.raises(PromptError, match=rf"inputs\[0\].{key}: this service samples from text only"):
            prompt_of({"messages": [USER], key: ["x"]}, template)
        assert prompt_of({"messages": [USER], key: []}, template)


def test_other_keys_of_a_feature_are_carried_over(template: Template) -> None:
    """Numbers and arrays of other sizes, texts even if there are as many as tokens, data of the caller."""
    keys: dict[str, Any] = {"reward": 1.5, "tags": ["a", "b"], "text": "abc", "user_data": [1, 2, 3], "none": None}
    keys |= {"words": ["a", "b", "c"], "scores": [0.5] * 5, "lists": [[], [], []], "of": [{"name": "a"}] * 3}
    feature = sampled(template, **keys)
    assert {key: feature[key] for key in keys} == keys
