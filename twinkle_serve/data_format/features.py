"""Input features of samples: the prompt and the sample as one training input."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.conventions import follows_twinkle
from twinkle_serve.data_format.columns import IGNORED_LABEL, OWN_COLUMNS, SAMPLED_COLUMNS, grown_columns
from twinkle_serve.data_format.messages import ChatMessage, Encoded, Turn, checksum, ids_checksum, tools_checksum
from twinkle_serve.data_format.plain import as_items, is_absent, plain
from twinkle_serve.data_format.prompts import InputFeature
from twinkle_serve.data_format.sequence import SampledSequence
from twinkle_serve.data_format.tool_calls import Tools
from twinkle_serve.data_format.weights import SampledSpan


def continued_feature(sequence: SampledSequence) -> InputFeature:
    """See `SampledSequence.new_input_feature`.

    Args:
        sequence: a sample of a call.

    Raises:
        ValueError: the response has no inputs.
    """
    response = sequence.response
    if not response.inputs:
        raise ValueError("new_input_feature continues an input, and the call was made with return_inputs=False.")
    ids, turn = prompt_of(sequence)
    prompt = ids.tolist()
    length = len(prompt) + len(sequence.tokens)
    source = response.inputs[int(response.columns.group[sequence.row])]
    feature = copy.deepcopy({key: value for key, value in source.items() if key not in OWN_COLUMNS})
    learnt = [IGNORED_LABEL] * len(prompt) if turn.labels is None else turn.labels.tolist()
    learnt += sequence.tokens
    feature |= {"input_ids": prompt + sequence.tokens, "labels": [*learnt[1:], IGNORED_LABEL]}
    feature |= grown_columns(source, length)
    logprobs = _rolled_logprobs(sequence, turn, len(prompt))
    if logprobs is not None:
        feature["logprobs"] = logprobs
    feature["weight_versions"] = sampled_spans(sequence, turn, len(prompt))
    if follows_twinkle():  # its rollouts append tokens to the columns that they know
        for key in SAMPLED_COLUMNS:
            if is_absent(source.get(key)):
                feature.pop(key, None)
    if not is_absent(source.get("messages")):
        tools = source.get("tools")
        given = as_items(feature["messages"]) or []
        messages, start = with_message(sequence, given, tools, turn, len(prompt))
        feature["messages"] = messages
        feature["encoded"] = Encoded(
            ids=length,
            checksum=ids_checksum(ids, sequence.token_array),
            messages=[*map(checksum, messages)],
            tools=tools_checksum(tools),
            assistant_start=start,
        )
        if turn.written is not None:
            feature["encoded"]["written"] = turn.written
    return cast(InputFeature, feature)


def prompt_of(sequence: SampledSequence) -> tuple[NDArray[np.int32], Turn]:
    """Returns the prompt of a sample of a call, and the beginning of the sampled turn that it contains."""
    response = sequence.response
    number = int(response.columns.group[sequence.row])
    return response.prompts[number], response.turns[number] if response.turns else Turn()


def sampled_spans(sequence: SampledSequence, turn: Turn, prompt_length: int) -> list[SampledSpan]:
    """Returns the sampled tokens of a prompt and its sample, by the weights that sampled them.

    A sample that continues another one of the same weights is in one span with it.
    """
    spans = [span.copy() for span in turn.weight_versions]
    for label, start, end in sequence.weight_versions:
        span = SampledSpan(
            weights=label, adapter=sequence.adapter, start=prompt_length + start, end=prompt_length + end
        )
        if spans and spans[-1] == {**span, "start": spans[-1]["start"], "end": span["start"]}:
            spans[-1]["end"] = span["end"]
        elif start < end:
            spans.append(span)
    return spans


def _rolled_logprobs(sequence: SampledSequence, turn: Turn, prompt_length: int) -> list[float] | None:
    """Returns the column of logprobs, aligned with the labels; None if there is none for any token."""
    sampled = sequence.logprob_array
    if sampled is None and turn.logprobs is None:
        return None
    known: list[float] = [0.0] * prompt_length if turn.logprobs is None else turn.logprobs.tolist()
    known += [0.0] * len(sequence.tokens) if sampled is None else sampled.tolist()
    return [*known[1:], 0.0]


def with_message(
    sequence: SampledSequence, messages: list[ChatMessage], tools: object, turn: Turn, prompt_length: int
) -> tuple[list[ChatMessage], int]:
    """Returns a prompt's messages with the sample's, and where its tokens begin. A sample without tokens adds none."""
    start = prompt_length if turn.resumed_at is None else turn.resumed_at
    if not sequence.tokens:
        return messages, start
    before = messages if turn.resumed_at is None else messages[:-1]
    known: Tools = () if is_absent(tools) else plain(tools)
    message = sequence.response.parser.message(turn.opening + sequence.whole_text, known, len(before))
    if turn.written is not None:  # other keys of a message that the caller began
        message = {key: messages[-1][key] for key in messages[-1] if key not in ("content", "tool_calls")} | message
    return [*before, message], start
