"""Samples whose tokens are drawn in this process, by the engines torch and fake."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

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
from twinkle_serve.data_format.sampling_params import DecodingParams, LogprobsMode
from twinkle_serve.engines.logits import LogitsProcessor, kept_tokens, logprob_row
from twinkle_serve.engines.protocol import columns_of_group
from twinkle_serve.engines.stops import Decode, Texts, exempt_characters, stop_cut


@dataclass(slots=True, kw_only=True)
class DrawnSample:
    """A sample being drawn."""

    params: DecodingParams
    process: LogitsProcessor
    logprobs_mode: LogprobsMode
    max_tokens: int
    eos: Collection[int]
    """End-of-sequence ids of the model."""
    decode: Decode
    tokens: list[int] = field(default_factory=list)
    logprobs: list[FloatArray] = field(default_factory=list)
    """Each of shape [1 + k + n]."""
    logprob_tokens: list[NDArray[np.int64]] = field(default_factory=list)
    """Each of shape [1 + k + n]."""
    masks: list[NDArray[np.int32]] = field(default_factory=list)
    """Ids of the tokens that could be drawn at each position."""
    weight_versions: list[tuple[str, int]] = field(default_factory=list)
    """Weights versions that sampled the tokens, each with the index of its first token."""
    stop_reason: StopReason | None = None
    by_stop_string: bool = False
    """Whether a stop string ended it, and so its text."""
    settled: int = 0
    """Number of tokens that did not end it."""

    def add(self, token: int, raw: FloatArray, logits: FloatArray) -> None:
        """Adds a token.

        Args:
            raw: the model's logits, shape [V].
            logits: those that it was drawn from.
        """
        params = self.params
        self.tokens.append(token)
        if params.logprobs is not None:
            source = raw if self.logprobs_mode == "raw_logprobs" else logits
            logprobs, ids = logprob_row(source, token, params.logprobs, params.logprob_token_ids)
            self.logprobs.append(logprobs)
            self.logprob_tokens.append(ids)
        if params.return_sampling_mask:
            self.masks.append(kept_tokens(logits))

    def sampled_by(self, label: str) -> None:
        """Records that the next token is sampled by this weights version."""
        if self.weight_versions and self.weight_versions[-1][1] == len(self.tokens):
            self.weight_versions.pop()
        if not self.weight_versions or self.weight_versions[-1][0] != label:
            self.weight_versions.append((label, len(self.tokens)))

    def end(self, *, aborted: bool) -> None:
        """Sets the stop reason if the last token ends the sample, or else if it is aborted."""
        self.stop_reason = self._reason() or ("abort" if aborted else None)
        if self.stop_reason is None:
            self.settled = len(self.tokens)

    def _reason(self) -> StopReason | None:
        params, count, last = self.params, len(self.tokens), self.tokens[-1]
        if last in params.stop_token_ids or (last in self.eos and not params.ignore_eos):
            return "stop"
        if params.stop_strings and count > params.min_tokens:
            exempt = exempt_characters(self.tokens, params, self.decode)
            if stop_cut(self.decode(self.tokens), params, exempt) is not None:
                self.by_stop_string = True
                return "stop"
        return "length" if count >= self.max_tokens else None

    def partial(self, offset: int) -> PartialSample | None:
        """See `Engine.partial_output`. Another thread may be drawing the next token."""
        settled, width = self.settled, self.params.logprobs_width
        if self.stop_reason is not None or settled <= offset:
            return None
        spans = [(label, start) for label, start in self.weight_versions if start < settled]
        logprobs = logprob_tokens = None
        if width:
            logprobs = np.array(self.logprobs[offset:settled], np.float32)
        if width > 1:
            logprob_tokens = np.array(self.logprob_tokens[offset:settled], np.int32)
        return PartialSample(
            tokens=np.array(self.tokens[offset:settled], np.int32),
            logprobs=logprobs,
            logprob_tokens=logprob_tokens,
            weight_versions=spans_from(spans, offset),
        )

    @property
    def logprob_array(self) -> FloatArray | None:
        """Shape [T, 1 + k + n]; None if not requested."""
        width = self.params.logprobs_width
        return np.array(self.logprobs, np.float32).reshape(-1, width) if width else None

    @property
    def logprob_token_array(self) -> NDArray[np.int32] | None:
        """Shape [T, 1 + k + n]; None if k + n = 0, or if not requested."""
        width = self.params.logprobs_width
        return np.array(self.logprob_tokens, np.int32).reshape(-1, width) if width > 1 else None


def columns_of_samples(
    group: Group, engine: str, samples: Sequence[DrawnSample], scores: PromptScores | None, decode: Decode
) -> SampleColumns:
    """Converts the samples of a group, once they are done."""
    params = group.params
    texts = Texts.of([each.tokens for each in samples], [each.by_stop_string for each in samples], params, decode)
    logprobs = [array for each in samples if (array := each.logprob_array) is not None]
    logprob_tokens = [ids for each in samples if (ids := each.logprob_token_array) is not None]
    return columns_of_group(
        group,
        engine,
        [each.tokens for each in samples],
        texts.decoded,
        [each.stop_reason or "length" for each in samples],
        np.concatenate(logprobs) if logprobs else None,
        np.concatenate(logprob_tokens) if logprob_tokens else None,
        scores,
        [tuple(each.weight_versions) for each in samples],
        whole_text=texts.whole,
        masks=[SamplingMask.of(each.masks) for each in samples] if params.return_sampling_mask else None,
    )
