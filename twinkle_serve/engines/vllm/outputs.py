"""Converts vLLM's outputs to samples, and reads its output processor for running requests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.samples import (
    FloatArray,
    PartialSample,
    PromptScores,
    SampleColumns,
    SamplingMask,
    StopReason,
    spans_from,
)
from twinkle_serve.data_format.weights import Spans
from twinkle_serve.engines.protocol import columns_of_group
from twinkle_serve.engines.stops import Decode, Texts
from twinkle_serve.errors import EngineError

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.output_processor import OutputProcessor


def group_columns(
    group: Group,
    engine: str,
    label: str,
    output: RequestOutput,
    samples: Sequence[CompletionOutput],
    decode: Decode,
) -> SampleColumns:
    """Converts the samples of a group.

    Args:
        label: of the loaded weights.
        output: of the group's request, for the scores of its prompt.

    Raises:
        EngineError: a sample ended for a reason that has no stop reason.
    """
    params = group.params
    reasons: list[StopReason] = [sample.finish_reason for sample in samples]
    if unfinished := set(reasons) - {"stop", "length", "abort"}:
        raise EngineError(f"{engine}: vLLM ended a sample with {unfinished.pop()!r}.")
    weight_versions = [_spans(sample, label) for sample in samples]
    scores = None
    if params.prompt_logprobs is not None:
        scores = _prompt_scores(output.prompt_logprobs, group.prompt_ids, params.prompt_logprobs)
    width = params.logprobs_width
    if params.max_tokens == 0:
        empty: list[list[int]] = [[] for _ in samples]
        return columns_of_group(
            group,
            engine,
            empty,
            [""] * len(empty),
            ["length"] * len(empty),
            np.empty((0, width), np.float32) if width else None,
            np.empty((0, width), np.int32) if width > 1 else None,
            scores,
            weight_versions,
            masks=[SamplingMask.of([]) for _ in empty] if params.return_sampling_mask else None,
        )
    tokens = [np.asarray(sample.token_ids, np.int32) for sample in samples]
    # vLLM's own text lacks the end-of-sequence token, so it is decoded here and cut at stop strings as vLLM does.
    cut = [isinstance(sample.stop_reason, str) for sample in samples]  # the stop string; a stop token is an int
    texts = Texts.of([sample.token_ids for sample in samples], cut, params, decode)
    logprobs, logprob_tokens = _sample_logprobs([sample.logprobs for sample in samples], width)
    masks = [_mask(sample) for sample in samples] if params.return_sampling_mask else None
    return columns_of_group(
        group,
        engine,
        tokens,
        texts.decoded,
        reasons,
        logprobs,
        logprob_tokens,
        scores,
        weight_versions,
        whole_text=texts.whole,
        masks=masks,
    )


def _mask(sample: CompletionOutput) -> SamplingMask:
    kept = [] if sample.sampling_mask is None else sample.sampling_mask.token_ids
    return SamplingMask.of([np.asarray(ids, np.int32) for ids in kept])


def _spans(sample: CompletionOutput, label: str) -> Spans:
    """Returns the weights versions of a sample's tokens; the loaded version for a sample without tokens."""
    spans = tuple((span.version, span.start) for span in sample.weight_versions or ())
    return spans or ((label, 0),)


def aborted_without_output(output: RequestOutput, group: Group) -> bool:
    """Whether a group was aborted before it had any results."""
    if all(sample.finish_reason != "abort" for sample in output.outputs):
        return False
    if group.params.prompt_logprobs is not None and output.prompt_logprobs is None:
        return True
    return not any(sample.token_ids for sample in output.outputs)


def _sample_logprobs(flat: Sequence[FlatLogprobs], width: int) -> tuple[FloatArray | None, NDArray[np.int32] | None]:
    """Converts each sample's FlatLogprobs to columns. Shape [T, width], the sampled token first."""
    if not width:
        return None, None
    logprobs = np.concatenate([np.asarray(part.logprobs, np.float32) for part in flat]).reshape(-1, width)
    if width == 1:
        return logprobs, None
    return logprobs, np.concatenate([np.asarray(part.token_ids, np.int32) for part in flat]).reshape(-1, width)


def _prompt_scores(flat: FlatLogprobs, prompt_ids: NDArray[np.int32], k: int) -> PromptScores:
    """Converts a prompt's FlatLogprobs: none for position 0, then the prompt token and the top k per position."""
    logprobs = np.asarray(flat.logprobs, np.float32).reshape(-1, 1 + k)
    tokens = np.asarray(flat.token_ids, np.int32).reshape(-1, 1 + k)
    assert len(tokens) == len(prompt_ids) - 1, (tokens.shape, len(prompt_ids))
    none = np.full((1, 1 + k), np.nan, np.float32)
    logprobs = np.concatenate([none, logprobs])
    tokens = np.concatenate([np.full((1, 1 + k), -1, np.int32), tokens])
    return PromptScores(logprobs=logprobs[:, 0], top_tokens=tokens[:, 1:], top_logprobs=logprobs[:, 1:])


async def last_output(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    """Returns the last output, which is complete."""
    async with contextlib.aclosing(outputs):
        return [output async for output in outputs][-1]


def has_tokens(processor: OutputProcessor, request_id: str) -> bool:
    """Whether each running sample of a request has a token."""
    states = [processor.request_states.get(internal) for internal in processor.external_req_ids.get(request_id, ())]
    return all(state is None or state.detokenizer.num_output_tokens() for state in states)


def running_tokens(processor: OutputProcessor) -> int:
    """Counts the tokens of all running samples."""
    tokens: int = sum(state.detokenizer.num_output_tokens() for state in processor.request_states.values())
    return tokens


def partial_sample(
    processor: OutputProcessor, request_id: str, sample: int, width: int, offset: int, label: str
) -> PartialSample | None:
    """Returns the tokens of a running sample, from token `offset` on; None if it has no more.

    Args:
        sample: index of the sample in the request.
        width: number of logprobs per token.
        label: of the loaded weights.
    """
    # Streaming the tokens instead would cost one output per token rather than one at the end.
    states = (processor.request_states.get(internal) for internal in processor.external_req_ids.get(request_id, ()))
    state = next((state for state in states if state is not None and state.request_index == sample), None)
    if state is None or state.detokenizer.num_output_tokens() <= offset:
        return None
    logprobs = logprob_tokens = None
    if width:
        flat, first = state.logprobs_processor.logprobs, offset * width
        logprobs = np.array(flat.logprobs[first:], np.float32).reshape(-1, width)
        if width > 1:
            logprob_tokens = np.array(flat.token_ids[first:], np.int32).reshape(-1, width)
    return PartialSample(
        tokens=np.array(state.detokenizer.output_token_ids[offset:], np.int32),
        logprobs=logprobs,
        logprob_tokens=logprob_tokens,
        weight_versions=spans_from(state.weight_version_starts or ((label, 0),), offset),
    )
