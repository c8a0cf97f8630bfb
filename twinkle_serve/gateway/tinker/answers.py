"""Samples in Tinker's form: a Protocol Buffers message `SampleResponse`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.samples import STOP_REASONS, FloatArray, PromptScores, SampleColumns
from twinkle_serve.errors import EngineError
from twinkle_serve.gateway.tinker.bodies import TensorBody
from twinkle_serve.gateway.tinker.calls import Wanted
from twinkle_serve.gateway.tinker.positions import alternatives, target_logprobs, targets_of
from twinkle_serve.gateway.tinker.protobuf import bytes_field, number_field, numbers_field

STOP, LENGTH = 0, 1
REASONS = {"stop": STOP, "length": LENGTH}
FLOAT32, INT64 = 1, 2
"""Types of tensors."""
NO_TOKEN, NO_LOGPROB = 0, -99999.0
"""Fill the places of likeliest tokens where there are none."""


def sample_response(response: SampleResponse, wanted: Wanted) -> bytes:
    """Encodes the response to a request.

    Args:
        response: its first prompt is the request's; others are positions of it.

    Raises:
        EngineError: a sample was aborted, which the protocol cannot express.
    """
    columns = response.columns.take(np.flatnonzero(response.columns.group == 0))
    message = b"".join(bytes_field(1, sequence) for sequence in _sequences(columns, wanted.topk_sample))
    if (scores := columns.scores.get(0)) is not None:
        length = len(response.prompts[0])
        if wanted.prompt_logprobs:
            message += bytes_field(2, _floats(_padded(scores, scores.logprobs, length, np.nan)))
        if wanted.topk_prompt:
            message += bytes_field(3, _likeliest_of_prompt(scores, length, wanted.topk_prompt))
    if wanted.targets is not None:
        message += bytes_field(5, _targets(response, wanted.targets))
    if wanted.alternatives:
        tokens, logprobs = alternatives(response, wanted.alternatives)
        message += bytes_field(6, bytes_field(1, _dense(tokens, INT64)) + bytes_field(2, _dense(logprobs, FLOAT32)))
    return message


def _sequences(columns: SampleColumns, k: int) -> list[bytes]:
    """Encodes each sample."""
    messages = []
    for row, (start, length) in enumerate(zip(columns.starts.tolist(), columns.lengths.tolist(), strict=True)):
        at = slice(start, start + length)
        message = number_field(1, _stop_reason(columns, row)) + bytes_field(2, _ints(columns.tokens[at]))
        if columns.logprobs is not None:
            message += bytes_field(3, _floats(columns.logprobs[at, 0]))
        if k and columns.logprobs is not None and columns.logprob_tokens is not None:
            others = slice(1, 1 + k)
            message += bytes_field(4, _likeliest(columns.logprob_tokens[at, others], columns.logprobs[at, others]))
        messages.append(message)
    return messages


def _stop_reason(columns: SampleColumns, row: int) -> int:
    reason = STOP_REASONS[columns.stop_reason[row]]
    if reason not in REASONS:
        raise EngineError(f"a sample ended by {reason} after {columns.lengths[row]} tokens. Send the request again.")
    return REASONS[reason]


def _likeliest_of_prompt(scores: PromptScores, length: int, k: int) -> bytes:
    tokens = _padded(scores, scores.top_tokens[:, :k], length, -1)
    return _likeliest(tokens, _padded(scores, scores.top_logprobs[:, :k], length, np.nan))


def _padded(scores: PromptScores, values: NDArray[Any], length: int, fill: float) -> NDArray[Any]:
    """Puts values from the scores' start on into an array over the whole prompt."""
    padded = np.full((length, *values.shape[1:]), fill, values.dtype)
    padded[scores.start :] = values
    return padded


def _likeliest(tokens: NDArray[np.int32], logprobs: FloatArray) -> bytes:
    """Encodes a message `TopkLogprobs`."""
    missing = (tokens < 0) | np.isnan(logprobs)
    length, k = tokens.shape
    return (
        bytes_field(1, _ints(np.where(missing, NO_TOKEN, tokens)))
        + bytes_field(2, _floats(np.where(missing, NO_LOGPROB, logprobs)))
        + number_field(3, k)
        + number_field(4, length)
    )


def _targets(response: SampleResponse, tensor: TensorBody) -> bytes:
    """Encodes the logprobs of named tokens as a message `Tensor`, in the layout of the request's."""
    targets = targets_of(tensor, len(response.prompts[0]))
    values = target_logprobs(response, targets, len(tensor.data))
    if tensor.sparse_crow_indices is None or tensor.sparse_col_indices is None:
        return _dense(values.reshape(tensor.shape), FLOAT32)
    csr = (
        bytes_field(1, _floats(values))
        + bytes_field(2, np.array(tensor.sparse_crow_indices, "<i8").tobytes())
        + bytes_field(3, np.array(tensor.sparse_col_indices, "<i8").tobytes())
    )
    return bytes_field(2, csr) + number_field(3, FLOAT32) + numbers_field(4, tensor.shape)


def _dense(values: NDArray[Any], dtype: int) -> bytes:
    """Encodes an array as a message `Tensor`."""
    data = values.astype("<f4" if dtype == FLOAT32 else "<i8").tobytes()
    return bytes_field(1, data) + number_field(3, dtype) + numbers_field(4, values.shape)


def _ints(values: NDArray[Any]) -> bytes:
    return values.astype("<i4", copy=False).tobytes()


def _floats(values: NDArray[Any]) -> bytes:
    return values.astype("<f4", copy=False).tobytes()
