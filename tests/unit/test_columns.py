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
        ({"loss_mask": [0, 1, 1]}, "loss_mask has a value for each of the 3 tokens"),
        ({"completion_mask": np.ones(3, bool)}, "completion_mask has a value for each"),
        ({"old_logps": torch.zeros(3)}, "old_logps has a value for each"),
        ({"routed_experts": np.zeros((3, 2, 4))}, "routed_experts has a value for each"),
        ({"mask": torch.zeros(2, 3)}, "mask has a value for each"),
        ({"words": ["a", "b", "c"]}, "words has a value for each"),
        ({"rows": [[1, 2, 3], [4, 5, 6]]}, "rows has a value for each"),
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


def test_audio_of_a_trajectory_is_refused(template: Template) -> None:
    """As its images are; an empty list is not."""
    for key in ("images", "videos", "audios", "audio"):
        with pytest.raises(PromptError, match=rf"inputs\[0\].{key}: this service samples from text only"):
            prompt_of({"messages": [USER], key: ["x"]}, template)
        assert prompt_of({"messages": [USER], key: []}, template)


def test_other_keys_of_a_feature_are_carried_over(template: Template) -> None:
    """Whatever their length: numbers, texts, data of the caller."""
    keys: dict[str, Any] = {"reward": 1.5, "tags": ["a", "b"], "text": "abc", "user_data": [1, 2, 3], "none": None}
    feature = sampled(template, **keys)
    assert {key: feature[key] for key in keys} == keys
