"""Conversations on every sampler: prompts contain all messages of the caller and all sampled tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from twinkle_serve import Template, hub
from twinkle_serve.errors import PromptError
from twinkle_serve.sampler import RunningSampler

USER = {"role": "user", "content": "12+34="}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PARAMS = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "ignore_eos": True}


def text_of(ids: Any) -> str:
    return Template(hub.DEMO).decode(np.asarray(ids, np.int32))


def test_sampler_continues_a_final_message(sampler: RunningSampler) -> None:
    """Every call that samples continues it. The prompt of the next turn begins with the ids of the whole message."""
    begun = {"messages": [USER, {"role": "assistant", "content": "Sum: "}]}
    with pytest.raises(PromptError, match="ends with an assistant's message"):
        sampler.sample(begun, PARAMS)
    sequence = sampler.sample(begun, PARAMS, continue_final_message=True).sequences[0]
    assert text_of(sequence.response.prompt_token_ids).endswith("<|im_start|>assistant\nSum: ")
    (part,) = sampler.sample_iter(begun, PARAMS, continue_final_message=True)
    assert part.sequences[0].tokens == sequence.tokens
    stream = sampler.sample_stream(begun, PARAMS, continue_final_message=True)
    assert "".join(delta for delta, _ in stream) == sequence.decoded
    feature: Any = sequence.new_input_feature
    assert len(feature["messages"]) == 2 and feature["messages"][1]["content"].startswith("Sum: ")
    resumed = sampler.sample(feature, PARAMS)
    assert resumed.prompt_token_ids == feature["input_ids"]
    assert len(resumed.sequences[0].new_input_feature["messages"]) == 2
    feature["messages"].append(USER)
    assert sampler.sample(feature, PARAMS).prompt_token_ids[: len(feature["input_ids"])] == feature["input_ids"]


def test_message_appended_to_a_feature_is_in_the_prompt_or_refused(sampler: RunningSampler) -> None:
    """Both with and without `encoded`, after a round trip through JSON; ids of another conversation are refused."""
    greedy = {**PARAMS, "temperature": 0, "ignore_eos": False}
    sequence = sampler.sample({"messages": [USER]}, greedy).sequences[0]
    feature: Any = json.loads(json.dumps(sequence.new_input_feature))
    feature["messages"].append({"role": "user", "content": "90+9="})
    with_encoded = sampler.sample(feature, greedy).prompt_token_ids
    assert with_encoded[: len(feature["input_ids"])] == feature["input_ids"] and "90+9=" in text_of(with_encoded)
    del feature["encoded"]
    if REPLACEMENT not in sequence.decoded:  # fake samples random bytes, which have no text
        assert sampler.sample(feature, greedy).prompt_token_ids == with_encoded
    feature["messages"][0] = {"role": "user", "content": "12+35="}
    with pytest.raises(PromptError, match=r"not the tokens of its messages.* is messages\[0\]"):
        sampler.sample(feature, greedy)


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"length": 2}, "length is 2, input_ids has 3 tokens"),
        ({"old_logps": np.zeros(2)}, "old_logps has a dimension of 2 numbers"),
        ({"attention_mask": [1, 2, 1]}, "attention_mask must be 1 for each token"),
        ({"labels": [-100, 6, 7]}, "labels ends with 7"),
    ],
)
def test_column_that_cannot_grow_is_refused_by_every_sampler(
    columns: dict[str, Any], error: str, sampler: RunningSampler
) -> None:
    """The next call works."""
    with pytest.raises(PromptError, match=rf"inputs\[0\].{error}"):
        sampler.sample({"input_ids": [5, 6, 7], **columns}, PARAMS)
    assert sampler.sample({"input_ids": [5, 6, 7], "words": ["a", "b", "c"]}, PARAMS).prompt_token_ids == [5, 6, 7]
