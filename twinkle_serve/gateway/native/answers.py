"""Responses as JSON, without a Python object for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.messages import ChatMessage, Turn
from twinkle_serve.data_format.plain import is_absent
from twinkle_serve.data_format.prompts import InputDict
from twinkle_serve.data_format.samples import NO_SEED, STOP_REASONS, FloatArray, PromptScores, SampleColumns
from twinkle_serve.data_format.weights import Spans
from twinkle_serve.errors import TemplateError

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have, as in vLLM's server."""


def dumps(value: object) -> bytes:
    """Serialises plain values and arrays; NaN becomes null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def to_json(response: SampleResponse) -> bytes:
    """Serialises a whole response."""
    head = {
        "prompt_indices": response.prompt_indices,
        "logprobs_mode": response.logprobs_mode,
        "logprobs_are_masked": response.logprobs_are_masked,
    }
    # One prompt at a time: orjson holds the GIL, and other requests have their turn in between.
    prompts = b",".join(map(dumps, prompts_of(response)))
    return b'{"prompts":[' + prompts + b"]," + dumps(head)[1:]


def prompts_of(response: SampleResponse) -> Iterator[dict[str, Any]]:
    """Yields each prompt with its samples, arrays still in it."""
    columns = response.columns
    rows = np.searchsorted(columns.group, np.arange(len(response) + 1)).tolist()
    starts = [*columns.starts.tolist(), len(columns.tokens)]
    sampled = None if columns.logprobs is None else _finite(columns.logprobs[:, 0])
    for i, ids in enumerate(response.prompts):
        source: InputDict = response.inputs[i] if response.inputs else {}
        if is_absent(source.get("messages")):
            source = {}
        yield {
            "prompt_index": response.prompt_indices[i],
            "prompt_token_ids": ids,
            **_scores(columns.scores.get(i), len(ids)),
            "sequences": [
                _sequence(response, i, row, slice(starts[row], starts[row + 1]), sampled, source)
                for row in range(rows[i], rows[i + 1])
            ],
        }


def _sequence(
    response: SampleResponse, prompt: int, row: int, at: slice, sampled: FloatArray | None, source: InputDict
) -> dict[str, Any]:
    """
    Args:
        at: its tokens in the columns.
        sampled: log p of each sampled token of the response.
        source: the conversation that the sample continues; empty if its input is none.
    """
    columns = response.columns
    width = columns.logprobs_width if columns.logprob_counts is None else int(columns.logprob_counts[row])
    seed = int(columns.seed[row])
    mask = None if columns.masks is None else columns.masks[row]
    return {
        "tokens": columns.tokens[at],
        "logprobs": None if sampled is None or not width else sampled[at],
        "top_logprobs": _top(columns, at, width),
        "decoded": columns.decoded[row],
        "stop_reason": STOP_REASONS[int(columns.stop_reason[row])],
        "seed": None if seed == NO_SEED else seed,
        "engine": columns.engine[row],
        "adapter": columns.adapter[row],
        "weight_versions": _spans(columns.weight_versions[row], at.stop - at.start),
        "message": _message(response, prompt, row, source),
        "sampling_mask": None if mask is None else {"counts": mask.counts, "tokens": mask.tokens},
    }


def _top(columns: SampleColumns, at: slice, width: int) -> dict[str, Any] | None:
    if columns.logprobs is None or columns.logprob_tokens is None or width < 2:
        return None
    return {
        "tokens": np.ascontiguousarray(columns.logprob_tokens[at, 1:width]),
        "logprobs": _finite(columns.logprobs[at, 1:width]),
    }


def _spans(spans: Spans, length: int) -> list[dict[str, Any]]:
    ends = [*(start for _, start in spans[1:]), length]
    return [
        {"version": label, "start": start, "end": end} for (label, start), end in zip(spans, ends, strict=bool(spans))
    ]


def _scores(scores: PromptScores | None, length: int) -> dict[str, Any]:
    """Returns the logprobs of a prompt of `length` tokens."""
    if scores is None:
        return {"prompt_logprobs": None, "top_prompt_logprobs": None}
    first = max(1, scores.start)
    logprobs = np.full(length, np.nan, np.float32)
    logprobs[first:] = _finite(scores.logprobs[first - scores.start :])
    top = None
    if scores.top_tokens.shape[1]:
        kept = slice(first - scores.start, None)
        tokens = np.ascontiguousarray(scores.top_tokens[kept])
        top = {"start": first, "tokens": tokens, "logprobs": _finite(scores.top_logprobs[kept])}
    return {"prompt_logprobs": logprobs, "top_prompt_logprobs": top}


def _finite(logprobs: NDArray[np.float32]) -> FloatArray:
    """Returns logprobs as JSON can hold them; NaN, which stands for none, stays."""
    return np.ascontiguousarray(np.maximum(logprobs, np.float32(LOWEST)))


def _message(response: SampleResponse, prompt: int, row: int, source: InputDict) -> ChatMessage | None:
    """Returns the assistant's message of a sample; None if its input is no conversation, or nothing was sampled."""
    if not source or not response.columns.lengths[row]:
        return None
    texts: Sequence[str] = response.columns.whole_text or response.columns.decoded
    turn = response.turns[prompt] if response.turns else Turn()
    number = len(source["messages"]) - (turn.resumed_at is not None)
    try:
        return response.parser.message(turn.opening + texts[row], source.get("tools") or (), number)
    except TemplateError:  # a parser that is registered in other processes only
        return None
