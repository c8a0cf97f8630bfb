"""Answers as the SDK reads them, field by field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker.proto.response_conv import deserialize_sample_response
from tinker.proto.tinker_public_pb2 import Tensor, TopkLogprobs

from tests.support.responses import columns, response
from twinkle_serve.data_format.samples import STOP_REASONS, PromptScores
from twinkle_serve.errors import EngineError
from twinkle_serve.gateway.tinker.answers import sample_response
from twinkle_serve.gateway.tinker.calls import Wanted
from twinkle_serve.gateway.tinker.protobuf import bytes_field, number_field, numbers_field

SCORES = PromptScores(
    logprobs=np.array([-1.5, -2.5], np.float32),
    top_tokens=np.array([[7, 8], [9, -1]], np.int32),
    top_logprobs=np.array([[-0.5, -1.0], [-0.25, np.nan]], np.float32),
    start=1,
)


def answer(wanted: Wanted, *, width: int = 3, scores: PromptScores | None = None) -> Any:
    made = columns(0, ["abc", "de"], width=width)
    if scores is not None:
        made.scores[0] = scores
    made.stop_reason[:] = [STOP_REASONS.index("stop"), STOP_REASONS.index("length")]
    return deserialize_sample_response(sample_response(response([made], [], [[1, 2, 3]]), wanted))


@settings(max_examples=30, deadline=None)
@given(number=st.integers(0, 2**32 - 1), data=st.binary(max_size=300))
def test_fields_are_those_that_googles_library_writes(number: int, data: bytes) -> None:
    """Numbers of any length, bytes of any."""
    reference = TopkLogprobs(token_ids=data, k=number).SerializeToString()
    assert (bytes_field(1, data) if data else b"") + number_field(3, number) == reference


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1))
def test_repeated_numbers_are_packed(numbers: list[int]) -> None:
    """As in proto3."""
    assert numbers_field(4, numbers) == Tensor(shape=numbers).SerializeToString()


def test_samples_have_tokens_logprobs_and_why_they_ended() -> None:
    """Nothing that was not asked for."""
    read = answer(Wanted())
    first, second = read.sequences
    assert (first.tokens, second.tokens) == ([97, 98, 99], [100, 101])
    assert (first.stop_reason, second.stop_reason) == ("stop", "length")
    assert second.logprobs == [-100.0, -101.0]
    assert first.topk_logprobs is None and read.prompt_logprobs is None and read.topk_prompt_logprobs is None
    assert read.target_prompt_logprobs is None and read.prompt_alt_tokens is None


def test_likeliest_tokens_stand_beside_each_sampled_one() -> None:
    """Without the sampled one, which comes first in our columns."""
    first, second = answer(Wanted(topk_sample=2)).sequences
    assert first.topk_logprobs[0] == [(97, -97.0), (98, -97.0)]
    assert len(second.topk_logprobs) == 2
    assert answer(Wanted(topk_sample=1)).sequences[0].topk_logprobs[2] == [(99, -99.0)]


def test_logprobs_of_prompts_cover_every_position() -> None:
    """None where there is none: before the scored ones, and in place of likeliest tokens that are missing."""
    read = answer(Wanted(prompt_logprobs=True, topk_prompt=2), scores=SCORES)
    assert read.prompt_logprobs == [None, -1.5, -2.5]
    assert read.topk_prompt_logprobs == [None, [(7, -0.5), (8, -1.0)], [(9, -0.25)]]
    assert answer(Wanted(topk_prompt=1), scores=SCORES).prompt_logprobs is None


def test_a_sample_that_was_aborted_is_no_answer() -> None:
    """The protocol has only `stop` and `length`."""
    made = columns(0, ["abc"])
    made.stop_reason[:] = STOP_REASONS.index("abort")
    with pytest.raises(EngineError, match="a sample ended by abort after 3 tokens"):
        sample_response(response([made], [], [[1]]), Wanted())


def test_what_a_request_wants_travels_as_text() -> None:
    """Whoever answers reads the same."""
    wanted = Wanted(prompt_logprobs=True, topk_prompt=2, topk_sample=3, alternatives=4)
    assert Wanted.unpacked(wanted.packed()) == wanted
