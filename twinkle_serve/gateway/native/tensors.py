"""Responses as safetensors: the columns themselves, and what is no column as JSON in the metadata.

docs/http.md describes the layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from twinkle_serve.data_format.inputs import as_list
from twinkle_serve.data_format.messages import MessageParser, Turn
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.sample_request import Inputs
from twinkle_serve.data_format.samples import PromptScores, SampleColumns, SamplingMask
from twinkle_serve.data_format.weights import Spans
from twinkle_serve.errors import RequestError

FORMAT = "twinkle-serve-samples-1"
"""Value of `format` in the metadata."""

COLUMNS = ("group", "sample", "lengths", "tokens", "stop_reason", "seed")
OPTIONAL_COLUMNS = ("logprobs", "logprob_tokens", "logprob_counts")
TEXTS = ("decoded", "engine", "adapter", "weight_versions", "whole_text")
DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F32": np.float32, "F64": np.float64}
ABSENT = -1
"""Length of an array that is not there, in a joined one."""

Array = NDArray[Any]


def to_tensors(response: SampleResponse) -> bytes:
    """Packs a response. `read_samples` is the other direction."""
    columns = response.columns
    arrays: dict[str, Array] = {name: getattr(columns, name) for name in COLUMNS}
    arrays |= {name: value for name in OPTIONAL_COLUMNS if (value := getattr(columns, name)) is not None}
    _join(arrays, "prompts", response.prompts, np.int32)
    arrays["prompt_indices"] = np.array(response.prompt_indices, np.int64)
    _join_scores(arrays, columns.scores)
    if columns.masks is not None:
        for name in ("counts", "tokens"):
            _join(arrays, f"mask.{name}", [getattr(mask, name, None) for mask in columns.masks], np.int32)
    _join(arrays, "turn.labels", [turn.labels for turn in response.turns], np.int64)
    _join(arrays, "turn.logprobs", [turn.logprobs for turn in response.turns], np.float64)
    parser = response.parser
    rest = {
        **{name: getattr(columns, name) for name in TEXTS},
        "logprobs_mode": response.logprobs_mode,
        "logprobs_are_masked": response.logprobs_are_masked,
        "parser": {
            "special_tokens": parser.special_tokens,
            # A parser of the operator's own stays with the service, which has parsed the messages.
            "tool_parser": parser.tool_parser if isinstance(parser.tool_parser, str) else None,
            "reasoning": parser.reasoning,
        },
        "turns": [
            {
                "opening": turn.opening,
                "resumed_at": turn.resumed_at,
                "written": turn.written,
                "weight_versions": turn.weight_versions,
            }
            for turn in response.turns
        ],
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    packed: bytes = save(contiguous, {"format": FORMAT, "response": json.dumps(rest)})
    return packed


def read_samples(data: bytes, inputs: Inputs = None) -> SampleResponse:
    """Reads the answer to `POST /sample` or `POST /score` with `Accept: application/octet-stream`.

    Args:
        data: the body of the answer.
        inputs: the inputs that were sent, for `new_input_feature`; they are not sent back.

    Returns:
        The response as a call from Python returns it.

    Raises:
        RequestError: the data is something else, such as the answer of an error.
    """
    try:
        metadata, arrays = _read(data)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}")
        rest = json.loads(metadata["response"])
        return _response(rest, arrays, as_list(inputs) or [])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise RequestError(
            f"these {len(data)} bytes are no response of {FORMAT!r}: {error}. Send the request with "
            "`Accept: application/octet-stream`, and check the status of the answer."
        ) from error


def _response(rest: Mapping[str, Any], arrays: Mapping[str, Array], inputs: list[Any]) -> SampleResponse:
    masks = None
    if "mask.counts" in arrays:
        parts = zip(_split(arrays, "mask.counts"), _split(arrays, "mask.tokens"), strict=True)
        masks = [None if counts is None else SamplingMask(counts=counts, tokens=_some(ids)) for counts, ids in parts]
    columns = SampleColumns(
        **{name: arrays[name] for name in COLUMNS},  # type: ignore[arg-type]
        **{name: arrays.get(name) for name in OPTIONAL_COLUMNS},  # type: ignore[arg-type]
        **{name: rest[name] for name in TEXTS if name != "weight_versions"},
        weight_versions=[_spans(each) for each in rest["weight_versions"]],
        scores=_split_scores(arrays),
        masks=masks,
    )
    parser = rest["parser"]
    indices = tuple(arrays["prompt_indices"].tolist())
    return SampleResponse(
        columns=columns,
        prompts=[_some(ids) for ids in _split(arrays, "prompts")],
        inputs=[dict(inputs[i]) for i in indices] if inputs else [],
        logprobs_mode=rest["logprobs_mode"],
        logprobs_are_masked=rest["logprobs_are_masked"],
        parser=MessageParser(
            special_tokens=tuple(parser["special_tokens"]),
            tool_parser=parser["tool_parser"],
            reasoning=cast("tuple[str, str] | None", parser["reasoning"] and tuple(parser["reasoning"])),
        ),
        turns=_turns(rest["turns"], arrays),
        prompt_indices=indices,
    )


def _turns(turns: Sequence[Mapping[str, Any]], arrays: Mapping[str, Array]) -> tuple[Turn, ...]:
    columns = zip(turns, _split(arrays, "turn.labels"), _split(arrays, "turn.logprobs"), strict=True)
    return tuple(
        Turn(
            opening=turn["opening"],
            resumed_at=turn["resumed_at"],
            written=turn["written"],
            labels=labels,
            logprobs=logprobs,
            weight_versions=tuple(turn["weight_versions"]),
        )
        for turn, labels, logprobs in columns
    )


def _spans(spans: Sequence[Sequence[Any]]) -> Spans:
    return tuple((label, start) for label, start in spans)


def _join_scores(arrays: dict[str, Array], scores: Mapping[int, PromptScores]) -> None:
    if not scores:
        return
    each = list(scores.values())
    arrays["scores.group"] = np.array(list(scores), np.int64)
    arrays["scores.start"] = np.array([score.start for score in each], np.int64)
    _join(arrays, "scores.logprobs", [score.logprobs for score in each], np.float32)
    _join(arrays, "scores.top_tokens", [score.top_tokens.reshape(-1) for score in each], np.int32)
    _join(arrays, "scores.top_logprobs", [score.top_logprobs.reshape(-1) for score in each], np.float32)


def _split_scores(arrays: Mapping[str, Array]) -> dict[int, PromptScores]:
    if "scores.group" not in arrays:
        return {}
    names = ("scores.logprobs", "scores.top_tokens", "scores.top_logprobs")
    groups, starts = arrays["scores.group"].tolist(), arrays["scores.start"].tolist()
    scores = {}
    for group, start, *parts in zip(groups, starts, *(_split(arrays, name) for name in names), strict=True):
        logprobs, tokens, top = (_some(part) for part in parts)
        shape = (len(logprobs), len(tokens) // len(logprobs) if len(logprobs) else 0)
        scores[group] = PromptScores(
            logprobs=logprobs, top_tokens=tokens.reshape(shape), top_logprobs=top.reshape(shape), start=start
        )
    return scores


def _join(arrays: dict[str, Array], name: str, parts: Sequence[Array | None], dtype: Any) -> None:
    """Adds arrays one after the other, and their lengths."""
    arrays[name] = np.concatenate([*(part for part in parts if part is not None), np.empty(0, dtype)]).astype(dtype)
    arrays[f"{name}.lengths"] = np.array([ABSENT if part is None else len(part) for part in parts], np.int64)


def _split(arrays: Mapping[str, Array], name: str) -> list[Array | None]:
    joined, lengths = arrays[name], arrays[f"{name}.lengths"]
    ends = np.cumsum(np.maximum(lengths, 0)).tolist()
    return [
        None if length == ABSENT else joined[end - length : end]
        for end, length in zip(ends, lengths.tolist(), strict=True)
    ]


def _some(part: Array | None) -> Array:
    if part is None:
        raise ValueError("an array is missing")
    return part


def _read(data: bytes) -> tuple[dict[str, str], dict[str, Array]]:
    """Reads a safetensors file: its metadata, and arrays over the same memory."""
    start = 8 + int.from_bytes(data[:8], "little")
    if not 8 < start <= len(data):
        raise ValueError("they are no safetensors file")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        array = np.frombuffer(memoryview(data)[start + first : start + last], DTYPES[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return metadata, arrays
