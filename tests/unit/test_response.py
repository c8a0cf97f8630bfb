"""Samples as columns, and the response that callers read."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.responses import columns, response
from twinkle_serve.data_format import SampleColumns, SampleResponse
from twinkle_serve.data_format.messages import MessageParser, Turn


@pytest.fixture
def two_prompts() -> SampleResponse:
    inputs: list[dict[str, Any]] = [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]
    return response([columns(0, ["abc", "d"], scored=True), columns(1, ["ef", ""])], inputs, [[1, 2], [3, 4]])


def test_sequences_are_flat_and_prompt_major(two_prompts: SampleResponse) -> None:
    """p0s0, p0s1, p1s0, p1s1, as Python lists on demand."""
    assert [seq.decoded for seq in two_prompts.sequences] == ["abc", "d", "ef", ""]
    assert [seq.prompt_index for seq in two_prompts.sequences] == [0, 0, 1, 1]
    assert two_prompts.sequences[0].tokens == [97, 98, 99]
    assert type(two_prompts.sequences[0].tokens[0]) is int
    assert [lp[0][1] for lp in two_prompts.sequences[2].logprobs or []] == [-101.0, -102.0]
    assert [seq.stop_reason for seq in two_prompts.sequences] == ["length", "stop", "length", "stop"]
    assert [seq.seed for seq in two_prompts.sequences] == [0, 1, 100, 101]


def test_response_iterates_by_prompt(two_prompts: SampleResponse) -> None:
    """Each part is the response to one prompt, with that prompt's scores."""
    assert len(two_prompts) == 2
    assert [[seq.decoded for seq in part.sequences] for part in two_prompts] == [["abc", "d"], ["ef", ""]]
    assert two_prompts[-1].prompt_token_ids == [3, 4]
    assert two_prompts[1].prompt_index == 1
    assert two_prompts[0].prompt_logprobs == [None, 0.0]
    assert two_prompts[1].prompt_logprobs is None
    assert [part.prompt_index for part in two_prompts[0:2]] == [0, 1]
    with pytest.raises(IndexError, match="prompt 2 of 2"):
        two_prompts[2]


def test_properties_of_one_prompt_raise_for_a_response_of_several(two_prompts: SampleResponse) -> None:
    """The message says how to select a prompt."""
    for name in ("prompt_token_ids", "prompt_logprobs", "topk_prompt_logprobs", "prompt_index"):
        with pytest.raises(ValueError, match=f"{name} needs a response to one prompt, this one has 2"):
            getattr(two_prompts, name)


def test_logprobs_list_no_token_twice() -> None:
    """The sampled token first, then the others of the k likeliest."""
    one = response([columns(0, ["a"], width=4)], [{"input_ids": [1]}], [[1]])
    assert one.sequences[0].logprobs == [[(97, -97.0), (98, -97.0)]]
    none = response([columns(0, ["a"], width=0)], [{"input_ids": [1]}], [[1]])
    assert none.sequences[0].logprobs is None


def test_new_input_feature_continues_the_prompt() -> None:
    """Labels and logprobs are rolled left by one; other keys are copied; the caller's data is unchanged."""
    source = {"input_ids": [1, 2, 3], "reward_id": 9}
    one = response([columns(0, [chr(7) + chr(8)])], [source], [[1, 2, 3]])
    assert one.sequences[0].new_input_feature == {
        "reward_id": 9,
        "input_ids": [1, 2, 3, 7, 8],
        "labels": [-100, -100, 7, 8, -100],
        "logprobs": [0.0, 0.0, -7.0, -8.0, 0.0],
        "weight_versions": [{"weights": "initial", "adapter": "", "start": 3, "end": 5}],
        "attention_mask": [1] * 5,
        "position_ids": [0, 1, 2, 3, 4],
        "length": 5,
    }
    assert source == {"input_ids": [1, 2, 3], "reward_id": 9}


def test_new_input_feature_needs_the_input(two_prompts: SampleResponse) -> None:
    """Calls by handle can leave inputs out; the rest of the response is the same."""
    without = replace(two_prompts, inputs=[])
    assert without[1].sequences[0].tokens == two_prompts[1].sequences[0].tokens
    with pytest.raises(ValueError, match="return_inputs=False"):
        _ = without[1].sequences[0].new_input_feature


def test_new_input_feature_appends_the_assistants_turn() -> None:
    """Without special tokens in its content; the caller's messages are unchanged."""
    source = {"messages": [{"role": "user", "content": "hi"}], "user_data": {"id": 3}}
    one = response([columns(0, ["42<|im_end|>"])], [source], [[1]])
    feature: Any = one.sequences[0].new_input_feature
    assert feature["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "42"}]
    assert feature["user_data"] == {"id": 3}
    assert len(source["messages"]) == 1


def test_part_of_a_response_keeps_the_turn_of_its_prompt() -> None:
    """The opening, the position of the first sampled token, and the labels of that prompt."""
    parser = MessageParser(reasoning=("<think>", "</think>"))
    inputs: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": "hi"}]} for _ in range(2)]
    turns = (Turn(), Turn(opening="<think>", labels=np.array([-100, 9], np.int64)))
    parts = [columns(0, ["a"]), columns(1, ["b</think>c"])]
    both = replace(response(parts, inputs, [[1, 2], [8, 9]]), parser=parser, turns=turns)
    for one in (both[1].sequences[0], both.sequences[1]):
        feature: Any = one.new_input_feature
        assert feature["messages"][-1] == {"role": "assistant", "content": "c", "reasoning_content": "b"}
        assert feature["labels"][:2] == [9, ord("b")]
        assert feature["encoded"]["assistant_start"] == 2
    first: Any = both[0].sequences[0].new_input_feature
    assert first["messages"][-1]["content"] == "a" and first["labels"] == [-100, 97, -100]


def test_features_of_two_samples_share_nothing() -> None:
    """Changing one does not change the other, nor the input."""
    source: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "user_data": {"ids": [3]}}
    made = response([columns(0, ["a", "b"])], [source], [[1]])
    one, other = (cast(Any, seq.new_input_feature) for seq in made.sequences)
    one["user_data"]["ids"].append(4)
    one["messages"][0]["content"] = "ho"
    one["messages"].append({})
    assert other["user_data"] == source["user_data"] == {"ids": [3]}
    assert other["messages"][0] == source["messages"][0] == {"role": "user", "content": "hi"}
    assert len(other["messages"]) == 2 and len(source["messages"]) == 1


def test_response_survives_pickling(two_prompts: SampleResponse) -> None:
    """Between processes; cached properties are computed again there."""
    assert two_prompts.sequences
    for made in (
        two_prompts,
        two_prompts[1],
        replace(two_prompts, prompts=[np.empty(0, np.int32), two_prompts.prompts[1]]),
    ):
        again = pickle.loads(pickle.dumps(made))
        assert "sequences" not in vars(again)
        assert [seq.tokens for seq in again.sequences] == [seq.tokens for seq in made.sequences]
        assert [ids.tolist() for ids in again.prompts] == [ids.tolist() for ids in made.prompts]
        assert [ids.dtype for ids in again.prompts] == [np.int32] * len(made)
        assert again.inputs == made.inputs and again.prompt_indices == made.prompt_indices


texts = st.lists(st.text("abc", max_size=4), min_size=1, max_size=3)


@given(st.lists(st.tuples(st.integers(0, 9), texts), min_size=1, max_size=6), st.sampled_from([0, 1, 3]), st.randoms())
def test_regrouped_sorts_parts_that_came_in_any_order(parts: list[tuple[int, list[str]]], width: int, rng: Any) -> None:
    """Every sample keeps its own tokens, logprobs, seed and text; other groups are left out."""
    made, count = [], dict.fromkeys(range(10), 0)
    for group, part in parts:
        made.append(columns(group, part, first=count[group], width=width))
        count[group] += len(part)
    rng.shuffle(made)
    wanted = sorted({group for group, _ in parts})[: max(1, len(parts) // 2)]
    result = SampleColumns.concat(made).regrouped({group: i for i, group in enumerate(wanted)})
    expected = [(i, text) for i, group in enumerate(wanted) for g, part in parts if g == group for text in part]
    assert list(zip(result.group.tolist(), result.decoded, strict=True)) == expected
    assert "".join(map(chr, result.tokens)) == "".join(text for _, text in expected)
    if width:
        assert result.logprobs is not None
        assert (result.logprobs[:, 0] == -result.tokens).all()
    rest = SampleColumns.concat(made).without(set(wanted))
    assert len(rest) + len(result) == sum(count.values())
