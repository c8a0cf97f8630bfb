"""Samples and responses made by hand, as Twinkle's are, and responses that are lists."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest

from tests.support.responses import columns, response
from twinkle_serve import SampledSequence, SampleResponse, conventions
from twinkle_serve.data_format.response_list import ResponseList, as_called


@pytest.fixture
def twinkles() -> Iterator[None]:
    conventions.follow_twinkle()
    yield
    conventions.follow_twinkle(False)


@pytest.fixture
def two_prompts() -> SampleResponse:
    inputs: list[dict[str, Any]] = [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]
    return response([columns(0, ["abc", "d"], scored=True), columns(1, ["ef", ""])], inputs, [[1, 2], [3, 4]])


def test_sample_is_made_by_keyword_and_by_position() -> None:
    """The arguments come back as they were given, in upstream's order, and the rest as upstream's defaults."""
    sample = SampledSequence("stop", [1, 2], [[(1, -0.5)], [(2, -1.0)]], "ab", {"input_ids": [0, 1, 2]}, [[3]])
    again = SampledSequence(
        stop_reason="stop",
        tokens=[1, 2],
        logprobs=[[(1, -0.5)], [(2, -1.0)]],
        decoded="ab",
        new_input_feature={"input_ids": [0, 1, 2]},
        routed_experts=[[3]],
    )
    assert sample == again and hash(sample) == hash(again)
    assert (sample.stop_reason, sample.tokens, sample.decoded) == ("stop", [1, 2], "ab")
    assert sample.new_input_feature == {"input_ids": [0, 1, 2]} and sample.routed_experts == [[3]]
    assert sample.token_array.tolist() == [1, 2] and sample.logprob_array is not None
    assert sample.logprob_array.tolist() == [-0.5, -1.0]
    bare = SampledSequence(stop_reason="length", tokens=[])
    for name in ("logprobs", "decoded", "new_input_feature", "routed_experts"):
        assert getattr(bare, name) is None
    assert (bare.seed, bare.engine, bare.adapter, bare.weight_versions) == (None, "", "", [])
    assert bare.logprob_array is None and "0 tokens, length" in repr(bare)


def test_logprobs_of_any_form_are_kept() -> None:
    """A fake sampler may give one number a token."""
    logprobs: Any = [-1.5, -2.0]
    sample = SampledSequence("length", [10, 20], logprobs=logprobs)
    assert sample.logprobs is logprobs
    assert sample.logprob_array is not None and sample.logprob_array.tolist() == [-1.5, -2.0]
    made = SampleResponse([sample, SampledSequence("stop", [1], [[(1, -0.5), (2, -1.0)]])])
    assert made.columns.logprobs is not None and made.columns.logprobs.tolist() == [[-1.5], [-2.0], [-0.5]]


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [([[(5, -1.0)]], "2 tokens and 1 logprobs"), ([[(5, -1.0)], [(7, -1.0)]], "do not have that of its token 6")],
)
def test_logprobs_of_other_tokens_are_named(logprobs: Any, message: str) -> None:
    """Where the array of the sampled tokens' logprobs is asked for."""
    with pytest.raises(ValueError, match=message):
        _ = SampledSequence("stop", [5, 6], logprobs).logprob_array


def test_prompt_is_given_as_a_list_or_an_array() -> None:
    """Its ids are kept as they are, and are in `prompts`."""
    ids: Any = np.arange(3)
    made = SampleResponse([SampledSequence("stop", [1])], ids)
    assert made.prompt_token_ids is ids and made.prompts[0].tolist() == [0, 1, 2]


def test_sample_can_be_changed_after_it_was_made() -> None:
    """As upstream's dataclass."""
    sample: Any = SampledSequence("stop", [1])
    sample.decoded = "x"
    sample.new_input_feature = {"input_ids": [1]}
    assert sample.decoded == "x" and sample.new_input_feature == {"input_ids": [1]}


def test_response_is_made_of_samples() -> None:
    """It is the response to one prompt, by position or keyword, and has columns like any other."""
    samples = [SampledSequence("stop", [5, 6], [[(5, -1.0)], [(6, -2.0)]], "hi"), SampledSequence("length", [7])]
    made = SampleResponse(samples, [1, 2, 3], [None, -0.1, -0.2], [None, [(1, -0.1)], [(2, -0.2)]])
    assert made.sequences is samples and made.prompt_token_ids == [1, 2, 3]
    assert made.prompt_logprobs == [None, -0.1, -0.2] and made.topk_prompt_logprobs == [None, [(1, -0.1)], [(2, -0.2)]]
    assert len(made) == 1 and made[0] is made and list(made) == [made] and made.prompt_index == 0
    assert made.columns.tokens.tolist() == [5, 6, 7] and made.columns.lengths.tolist() == [2, 1]
    assert made.columns.logprobs is None, "one of the samples has none"
    assert "1 prompts, 2 sequences, 3 tokens" in repr(made)
    bare = SampleResponse(sequences=[samples[0]])
    for name in ("prompt_token_ids", "prompt_logprobs", "topk_prompt_logprobs"):
        assert getattr(bare, name) is None
    assert bare.columns.logprobs is not None and bare.columns.logprobs.tolist() == [[-1.0], [-2.0]]


def test_response_needs_samples_or_columns() -> None:
    """And not both."""
    made = columns(0, ["a"])
    wrong: list[dict[str, Any]] = [
        {},
        {"sequences": [], "columns": made},
        {"columns": made, "prompt_token_ids": [1]},
    ]
    for arguments in wrong:
        with pytest.raises(TypeError, match="either sequences or columns"):
            SampleResponse(**arguments)


def test_samples_that_cannot_be_columns_are_named() -> None:
    """Only where columns are asked for."""
    tokens: Any = ["a"]
    made = SampleResponse([SampledSequence("stop", tokens)])
    assert made.sequences[0].tokens is tokens
    with pytest.raises(ValueError, match=r"cannot be put in columns: .*'a'"):
        _ = made.columns


@pytest.mark.parametrize("dump", [pickle, cloudpickle])
def test_made_responses_survive_pickling_and_copying(dump: Any) -> None:
    """Ray sends them between processes."""
    feature = {"input_ids": np.arange(3), "messages": [{"role": "user", "content": "x"}]}
    made = SampleResponse([SampledSequence("stop", [1], decoded="x", new_input_feature=feature)], [1, 2])
    for again in (dump.loads(dump.dumps(made)), copy.deepcopy(made)):
        assert again == made and again.sequences[0].new_input_feature["input_ids"].tolist() == [0, 1, 2]
    sample = made.sequences[0]
    assert dump.loads(dump.dumps(sample)) == sample


def test_samples_of_a_call_are_equal_to_samples_made_alike(two_prompts: SampleResponse) -> None:
    """Equality is of values, whatever they are made of."""
    first = two_prompts.sequences[0]
    twin = SampledSequence("length", first.tokens, first.logprobs, first.decoded, first.new_input_feature)
    assert first == twin and hash(first) == hash(twin)
    assert first != SampledSequence("length", first.tokens, first.logprobs, "other", first.new_input_feature)
    assert first != "abc" and two_prompts != [1]
    assert two_prompts == pickle.loads(pickle.dumps(two_prompts)) and two_prompts != two_prompts[0]
    part = two_prompts[1]
    assert SampleResponse(part.sequences, part.prompt_token_ids, None, None) == part


def test_sample_of_a_call_survives_pickling(two_prompts: SampleResponse) -> None:
    """With its seed and engine."""
    sample = pickle.loads(pickle.dumps(two_prompts.sequences[2]))
    assert sample == two_prompts.sequences[2] and (sample.seed, sample.engine) == (100, "engine-dp1")


def test_response_is_a_list_where_defaults_are_twinkles(two_prompts: SampleResponse, twinkles: None) -> None:
    """Of one response a prompt, and still the response to the whole call."""
    both = as_called(two_prompts)
    assert isinstance(both, list) and isinstance(both, SampleResponse)
    assert len(both) == 2 and [type(part) for part in both] == [SampleResponse] * 2
    assert [len(part.sequences) for part in both] == [2, 2] and both[1].prompt_token_ids == [3, 4]
    assert list(both.sequences) == list(two_prompts.sequences)
    assert both.prompts is two_prompts.prompts and both.columns is two_prompts.columns
    assert both.prompt_indices == (0, 1) and repr(both) == repr(two_prompts)
    assert both + list(both) == [*both, *both]
    assert json.dumps(both, default=lambda part: part.prompt_token_ids) == "[[1, 2], [3, 4]]"
    with pytest.raises(ValueError, match="needs a response to one prompt"):
        _ = both.prompt_token_ids
    alone = as_called(two_prompts[0])
    assert len(alone) == 1 and alone[0].sequences == alone.sequences and alone.prompt_token_ids == [1, 2]


def test_response_is_no_list_otherwise(two_prompts: SampleResponse) -> None:
    """Nothing is computed that the caller does not ask for."""
    assert as_called(two_prompts) is two_prompts and not isinstance(two_prompts, list)


@pytest.mark.parametrize("dump", [pickle, cloudpickle])
def test_list_of_responses_survives_pickling(two_prompts: SampleResponse, dump: Any) -> None:
    """An unchanged response stays one; a changed list is pickled as a list."""
    both = ResponseList(two_prompts)
    again = dump.loads(dump.dumps(both))
    assert type(again) is ResponseList and again == both and again.sequences == both.sequences
    del both[0]
    again = dump.loads(dump.dumps(both))
    assert type(again) is list and again == [two_prompts[1]]
    assert copy.deepcopy(both) == [two_prompts[1]]


def test_changed_list_of_responses_is_only_a_list(two_prompts: SampleResponse) -> None:
    """Its samples are those of its items; no attribute of the call stands for it."""
    both = ResponseList(two_prompts)
    both.extend(ResponseList(two_prompts))
    assert [sample.decoded for sample in both.sequences] == ["abc", "d", "ef", ""] * 2
    for name in ("columns", "prompts", "inputs", "prompt_indices"):
        with pytest.raises(ValueError, match="has been changed since the call"):
            getattr(both, name)
    with pytest.raises(AttributeError):
        _ = ResponseList(two_prompts).unknown


def test_logprobs_are_upstreams_where_defaults_are_twinkles(twinkles: None) -> None:
    """1: of the sampled token alone. k of 2 and more: of the k likeliest, whether sampled or not."""

    def logprobs(width: int) -> list[int]:
        one = response([columns(0, ["a"], width=width)], [{"input_ids": [1]}], [[1]])
        found = one.sequences[0].logprobs
        assert found is not None
        return [token for token, _ in found[0]]

    assert logprobs(1) == [97] and logprobs(2) == [97]
    # The tokens of the other columns are ord("a") + i // 2 for column i.
    assert logprobs(3) == [97, 98] and logprobs(4) == [97, 98, 98]
