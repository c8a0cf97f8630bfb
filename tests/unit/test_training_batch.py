"""A response as tensors for a trainer: padded rows, or one packed row."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.responses import columns, response
from twinkle_serve import SampledSequence, SampleResponse, TorchSampler
from twinkle_serve.data_format.messages import Turn
from twinkle_serve.data_format.response_list import ResponseList
from twinkle_serve.data_format.weights import SampledSpan
from twinkle_serve.errors import RequestError

EARLIER = SampledSpan(weights="one", adapter="a@1", start=1, end=2)
SECOND_TURN = Turn(labels=np.array([-100, 4, -100]), logprobs=np.array([0.0, -0.5, 0.0]), weight_versions=(EARLIER,))
"""Of the prompt [3, 4, 5], whose token 4 was sampled."""
NOT_TENSORS = ("prompt_indices", "weight_versions", "adapters", "seeds", "stop_reasons")


@pytest.fixture
def two_turns() -> SampleResponse:
    """Prompts [1, 2] and [3, 4, 5], the second in its second turn; the last sample has no tokens."""
    inputs: list[dict[str, Any]] = [{"input_ids": [1, 2]}, {"input_ids": [3, 4, 5]}]
    made = response([columns(0, ["abc", "d"]), columns(1, ["ef", ""])], inputs, [[1, 2], [3, 4, 5]])
    return replace(made, turns=(Turn(), SECOND_TURN))


def numpy_batch(made: SampleResponse, **options: Any) -> dict[str, Any]:
    return dict(made.to_training_batch(tensors="numpy", **options))


def test_padded_rows_have_the_columns_of_the_training_inputs(two_turns: SampleResponse) -> None:
    """One row a sample, in the order of sequences, with labels and logprobs of earlier turns."""
    batch = numpy_batch(two_turns)
    assert batch["input_ids"].tolist() == [[1, 2, 97, 98, 99], [1, 2, 100, 0, 0], [3, 4, 5, 101, 102], [3, 4, 5, 0, 0]]
    assert batch["labels"].tolist()[1:] == [
        [-100, 100, -100, -100, -100],
        [4, -100, 101, 102, -100],
        [4, -100, -100, -100, -100],
    ]
    assert batch["logprobs"].tolist()[2:] == [[-0.5, 0.0, -101.0, -102.0, 0.0], [-0.5, 0.0, 0.0, 0.0, 0.0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1] * 5, [1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 4
    assert (batch["loss_mask"] == (batch["labels"] != -100)).all()
    assert "cu_seqlens" not in batch and "sequence_ids" not in batch


def test_packed_row_holds_the_same_tokens(two_turns: SampleResponse) -> None:
    """Each sample begins at position 0, at an index in cu_seqlens; a mask, which would not keep them apart, is left
    out."""
    padded, packed = numpy_batch(two_turns), numpy_batch(two_turns, packed=True)
    inside = padded["attention_mask"] == 1
    for name in ("input_ids", "labels", "logprobs", "loss_mask", "position_ids"):
        assert packed[name].shape == (1, 16) and packed[name][0].tolist() == padded[name][inside].tolist()
    assert packed["cu_seqlens"].tolist() == [0, 5, 8, 13, 16] and packed["cu_seqlens"].dtype == np.int32
    assert packed["sequence_ids"][0].tolist() == [0] * 5 + [1] * 3 + [2] * 5 + [3] * 3
    assert "attention_mask" not in packed
    assert {name: packed[name] for name in NOT_TENSORS} == {name: padded[name] for name in NOT_TENSORS}


def test_row_takes_nothing_from_the_next_one(two_turns: SampleResponse) -> None:
    """A prompt that was cut on the left may begin with a sampled token, which nothing before it predicts."""
    cut = Turn(labels=np.array([3, 4, -100]), logprobs=np.array([-0.25, -0.5, 0.0]))
    batch = numpy_batch(replace(two_turns, turns=(Turn(), cut)), packed=True)
    ends = batch["cu_seqlens"][1:] - 1
    assert batch["labels"][0, ends].tolist() == [-100] * 4 and not batch["logprobs"][0, ends].any()
    assert batch["labels"][0, 8:11].tolist() == [4, -100, 101]


def test_rows_are_padded_to_a_multiple(two_turns: SampleResponse) -> None:
    """With the given token, which is never attended to or learnt; in a packed row it is a sequence of its own."""
    padded = numpy_batch(two_turns, pad_to_multiple_of=4, pad_token_id=9)
    assert padded["input_ids"].shape == (4, 8) and padded["input_ids"][1].tolist() == [1, 2, 100, 9, 9, 9, 9, 9]
    assert padded["labels"][:, 5:].max() == -100 and not padded["logprobs"][:, 5:].any()
    assert not padded["loss_mask"][:, 5:].any() and not padded["attention_mask"][:, 5:].any()
    packed = numpy_batch(two_turns, packed=True, pad_to_multiple_of=10, pad_token_id=9)
    assert packed["input_ids"][0, 16:].tolist() == [9] * 4 and packed["position_ids"][0, 16:].tolist() == [0, 1, 2, 3]
    assert packed["cu_seqlens"].tolist() == [0, 5, 8, 13, 16, 20]
    assert packed["sequence_ids"][0, 16:].tolist() == [-1] * 4 and not packed["loss_mask"][0, 16:].any()
    fitting = numpy_batch(two_turns, packed=True, pad_to_multiple_of=8)
    assert fitting["cu_seqlens"].tolist() == [0, 5, 8, 13, 16]


def test_rows_say_what_sampled_them(two_turns: SampleResponse) -> None:
    """Prompt, seed, reason of the end, adapter, and the weights of each token, with those of earlier turns."""
    two_turns.columns.adapter[2] = "a@2"
    batch = numpy_batch(two_turns)
    assert batch["prompt_indices"] == [0, 0, 1, 1] and batch["seeds"] == [0, 1, 100, 101]
    assert batch["stop_reasons"] == ["length", "stop", "length", "stop"] and batch["adapters"] == ["", "", "a@2", ""]
    now = {"weights": "initial", "adapter": "a@2", "start": 3, "end": 5}
    assert batch["weight_versions"][2:] == [[EARLIER, now], [EARLIER]]
    assert numpy_batch(two_turns[1])["prompt_indices"] == [1, 1], "indices in the call"


texts = st.lists(st.text("abc", max_size=4), min_size=1, max_size=3)


@given(st.lists(st.tuples(st.integers(1, 4), texts), min_size=1, max_size=4), st.booleans())
def test_every_row_is_its_samples_training_input(prompts: list[tuple[int, list[str]]], scored: bool) -> None:
    """Whatever the lengths; and a call without logprobs has no such column."""
    ids = [list(range(1, length + 1)) for length, _ in prompts]
    parts = [columns(i, part, width=int(scored)) for i, (_, part) in enumerate(prompts)]
    made = response(parts, [{"input_ids": row} for row in ids], ids)
    batch, packed = numpy_batch(made), numpy_batch(made, packed=True)
    for i, sequence in enumerate(made.sequences):
        feature: Any = sequence.new_input_feature
        row = slice(*packed["cu_seqlens"][i : i + 2])
        assert batch["attention_mask"][i].sum() == feature["length"]
        for name in ("input_ids", "labels", "logprobs", "position_ids")[:: 1 if scored else 3]:
            assert batch[name][i, : feature["length"]].tolist() == packed[name][0, row].tolist() == feature[name]
        assert batch["weight_versions"][i] == feature["weight_versions"]
    assert ("logprobs" in batch) is ("logprobs" in packed) is scored


def test_inputs_are_not_needed(two_turns: SampleResponse) -> None:
    """After a call with return_inputs=False, prompts and earlier turns are known all the same."""
    with_inputs, without = numpy_batch(two_turns), numpy_batch(replace(two_turns, inputs=[]))
    assert with_inputs.keys() == without.keys()
    for name, value in with_inputs.items():
        assert value == without[name] if name in NOT_TENSORS else (value == without[name]).all()


def test_logprobs_of_earlier_turns_are_enough(two_turns: SampleResponse) -> None:
    """A call without logprobs that continues one with them has a column, 0 where they are unknown."""
    silent = replace(two_turns, columns=replace(two_turns.columns, logprobs=None))
    assert numpy_batch(silent)["logprobs"][2].tolist() == [-0.5, 0.0, 0.0, 0.0, 0.0]
    assert "logprobs" not in numpy_batch(silent[0])
    assert numpy_batch(ResponseList(silent))["logprobs"].shape == (4, 5)


def test_samples_are_never_cut(two_turns: SampleResponse) -> None:
    """One that is longer than max_length is an error with both numbers."""
    assert numpy_batch(two_turns, max_length=5)["input_ids"].shape == (4, 5)
    for packed in (False, True):
        with pytest.raises(RequestError, match=r"sequences\[0\] has 5 tokens with its prompt, max_length is 4"):
            two_turns.to_training_batch(max_length=4, packed=packed)


def test_tensors_are_of_the_library_that_is_asked_for(
    two_turns: SampleResponse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch by default. Without it the call is refused; arrays of numpy are never returned instead."""
    batch, arrays = two_turns.to_training_batch(), numpy_batch(two_turns)
    dtypes = {"logprobs": torch.float32, "loss_mask": torch.bool}
    for name, tensor in batch.items():
        if name not in NOT_TENSORS:
            assert cast(Any, tensor).dtype == dtypes.get(name, torch.int64) and isinstance(arrays[name], np.ndarray)
            assert cast(Any, tensor).tolist() == arrays[name].tolist()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RequestError, match=r"needs torch, which is not installed here"):
        two_turns.to_training_batch()
    assert numpy_batch(two_turns)["input_ids"].shape == (4, 5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"packed": 1}, "packed must be true or false, got 1"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1, got 0"),
        ({"pad_to_multiple_of": 1.5}, "pad_to_multiple_of must be a whole number"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": "8"}, "max_length must be a whole number"),
        ({"pad_token_id": -1}, "pad_token_id must be at least 0, got -1"),
        ({"pad_token_id": None}, "pad_token_id must be a whole number"),
        ({"tensors": "jax"}, "tensors must be one of torch, numpy, got 'jax'"),
        ({"tensors": None}, "tensors must be one of torch, numpy, got None"),
    ],
)
def test_invalid_options_are_refused(two_turns: SampleResponse, options: dict[str, Any], error: str) -> None:
    """By name."""
    with pytest.raises(RequestError, match=error):
        two_turns.to_training_batch(**options)


# -- lists of responses, and responses made by hand ----------------------------------------------


def test_list_of_responses_gives_the_samples_that_are_in_it(two_turns: SampleResponse) -> None:
    """All of the call, or those of the items after it has been changed, such as by leaving prompts out."""
    both = ResponseList(two_turns)
    assert numpy_batch(both)["input_ids"].tolist() == numpy_batch(two_turns)["input_ids"].tolist()
    del both[0]
    assert numpy_batch(both)["input_ids"].tolist() == [[3, 4, 5, 101, 102], [3, 4, 5, 0, 0]]
    both.append(SampleResponse([SampledSequence("stop", [7])], [6]))
    assert numpy_batch(both)["input_ids"][2].tolist() == [6, 7, 0, 0, 0]
    assert numpy_batch(both)["logprobs"][2].tolist() == [0.0] * 5, "unknown"
    assert numpy_batch(both)["prompt_indices"] == [1, 1, 0]


def test_response_made_by_hand_is_a_batch() -> None:
    """Of its prompt and its samples; without logprobs of any there is no column."""
    samples = [SampledSequence("stop", [5, 6], [[(5, -1.0)], [(6, -2.0)]]), SampledSequence("length", [])]
    batch = numpy_batch(SampleResponse(samples, [1, 2]))
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6], [1, 2, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100], [-100] * 4]
    assert batch["logprobs"].tolist() == [[0.0, -1.0, -2.0, 0.0], [0.0] * 4]
    assert (batch["seeds"], batch["adapters"]) == ([None, None], ["", ""]) and batch["weight_versions"] == [[], []]
    assert "logprobs" not in numpy_batch(SampleResponse([SampledSequence("stop", [5])], [1]))
    nothing = numpy_batch(SampleResponse([]))
    assert nothing["input_ids"].shape == (0, 0) and nothing["seeds"] == []
    assert numpy_batch(SampleResponse([]), packed=True)["cu_seqlens"].tolist() == [0]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_sample_made_by_hand_brings_its_training_input(kind: Any) -> None:
    """With its prompt, its labels and its logprobs, those of earlier turns included."""
    feature = {"input_ids": kind([1, 2, 5, 6]), "labels": kind([2, -100, 6, -100])}
    sample = SampledSequence("stop", [5, 6], [[(5, -1.0)], [(6, -2.0)]], new_input_feature=feature)
    batch = numpy_batch(SampleResponse([sample]))
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6]] and batch["labels"].tolist() == [[2, -100, 6, -100]]
    assert batch["logprobs"].tolist() == [[0.0, 0.0, -2.0, 0.0]], "token 5 has no label"
    whole = {**feature, "logprobs": kind([-0.5, 0.0, -0.25, 0.0]), "weight_versions": [EARLIER]}
    batch = numpy_batch(SampleResponse([SampledSequence("stop", [5, 6], new_input_feature=whole)]))
    assert batch["logprobs"].tolist() == [[-0.5, 0.0, -0.25, 0.0]] and batch["weight_versions"] == [[EARLIER]]
    bare = SampledSequence("stop", [6], new_input_feature={"input_ids": kind([1, 2, 5, 6])})
    assert numpy_batch(SampleResponse([bare]))["labels"].tolist() == [[-100, -100, 6, -100]]


def test_samples_of_a_call_keep_their_prompts_in_a_response_made_by_hand(two_turns: SampleResponse) -> None:
    """Such as the best of each prompt."""
    chosen = SampleResponse([two_turns.sequences[2], two_turns.sequences[0]])
    batch = numpy_batch(chosen)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 101, 102], [1, 2, 97, 98, 99]]
    assert batch["labels"][0].tolist() == [4, -100, 101, 102, -100] and batch["prompt_indices"] == [1, 0]


@pytest.mark.parametrize(
    ("feature", "error"),
    [
        (None, "has no prompt, and so no position at which its first token is predicted"),
        ({"input_ids": [1, 5, 6]}, "does not end with the sample's tokens"),
        ({"input_ids": [5]}, "does not end with the sample's tokens"),
        ({"input_ids": [[1, 6, 5]]}, r"\['input_ids'\] of a sample made by hand has shape \(1, 3\)"),
        ({"input_ids": [1.0, 6.0, 5.0]}, r"\['input_ids'\] .* type float64. It must have one dimension of whole"),
        ({"input_ids": [1, [2]]}, r"\['input_ids'\] is not an array of numbers"),
        ({"input_ids": [1, 6, 5], "labels": [6, 5]}, r"\['labels'\] .* must have a number for each of its 3 tokens"),
        ({"input_ids": [1, 6, 5], "logprobs": [[0.0], [0.0], [0.0]]}, r"\['logprobs'\] .* has shape \(3, 1\)"),
    ],
)
def test_invalid_sample_made_by_hand_is_refused(feature: Any, error: str) -> None:
    """Wrong rows would be trained on."""
    made = SampleResponse([SampledSequence("stop", [6, 5], new_input_feature=feature)])
    with pytest.raises(RequestError, match=error):
        made.to_training_batch()


# -- a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_batch_of_a_conversation_gives_the_logprobs_that_were_sampled(packed: bool) -> None:
    """A trainer's forward pass over the batch, padded or packed, has them at the positions of its labels."""
    from transformers import AutoModelForCausalLM

    from twinkle_serve import hub

    sampler = TorchSampler("demo", {"dtype": "float32"})
    params = {"max_tokens": 6, "temperature": 1.0, "seed": 1, "ignore_eos": False}
    questions = [{"messages": [{"role": "user", "content": text}]} for text in ("12+34=", "1+1=", "345-67=")]
    first = sampler.sample(questions, params, num_samples=2)
    features: list[Any] = [sequence.new_input_feature for sequence in first.sequences]
    for feature in features:
        feature["messages"].append({"role": "user", "content": "2+2="})
    response = sampler.sample(features, params)
    sampler.shutdown()
    batch: Any = response.to_training_batch(packed=packed, pad_to_multiple_of=16)
    model = AutoModelForCausalLM.from_pretrained(hub.DEMO, dtype=torch.float32)
    given = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    with torch.no_grad():
        logprobs = model(**given, use_cache=False).logits.log_softmax(-1)
    mask = batch["loss_mask"]
    own = logprobs.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    assert mask.sum() == sum(len(s.tokens) for made in (first, response) for s in made.sequences)
    assert (own - batch["logprobs"])[mask].abs().max() < 1e-3
