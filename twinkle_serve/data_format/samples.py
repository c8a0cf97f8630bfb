"""Samples as numpy columns, as engines produce and send them.

A Python list of a million numbers takes longer to pickle than to sample; columns cost a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.weights import Spans

FloatArray: TypeAlias = NDArray[np.float32]
StopReason: TypeAlias = Literal["length", "stop", "abort", "error"]

STOP_REASONS: tuple[StopReason, ...] = get_args(StopReason)
"""Name of each code in `SampleColumns.stop_reason`."""

NO_SEED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """Logprobs of the tokens of one prompt from a position on, R of them. Position 0 has none: NaN, and token −1."""

    logprobs: FloatArray
    """Shape [R], nats."""
    top_tokens: NDArray[np.int32]
    """The k likeliest tokens at each position, best first. Shape [R, k]; k may be 0."""
    top_logprobs: FloatArray
    """Shape [R, k], nats."""
    start: int = 0
    """Position in the prompt of the first of them."""

    def since(self, start: int) -> PromptScores:
        """Returns those from a position of the prompt on."""
        rows = slice(start - self.start, None)
        return PromptScores(
            logprobs=self.logprobs[rows],
            top_tokens=self.top_tokens[rows],
            top_logprobs=self.top_logprobs[rows],
            start=start,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingMask:
    """The tokens that could be sampled at each of the T positions of a sample."""

    counts: NDArray[np.int32]
    """Number of tokens at each position. Shape [T], sum M."""
    tokens: NDArray[np.int32]
    """Their ids, ascending at each position. Shape [M]."""

    def __len__(self) -> int:
        return len(self.counts)

    @classmethod
    def of(cls, kept: Sequence[NDArray[np.int32]]) -> SamplingMask:
        """Joins the token ids of each position."""
        return cls(
            counts=np.array([len(ids) for ids in kept], np.int32),
            tokens=np.concatenate([*kept, np.empty(0, np.int32)]).astype(np.int32, copy=False),
        )

    def at(self, position: int) -> NDArray[np.int32]:
        """Returns the token ids of a position; a negative one counts from the end."""
        position = range(len(self))[position]
        end = int(self.counts[: position + 1].sum())
        return self.tokens[end - int(self.counts[position]) : end]


def spans_from(spans: Sequence[tuple[str, int]], offset: int) -> Spans:
    """Returns the spans of a sample's tokens from `offset` on."""
    later = [(label, start - offset) for label, start in spans if start > offset]
    before = [(label, 0) for label, start in spans if start <= offset]
    return (*before[-1:], *later)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialSample:
    """T tokens of an unfinished sample: its first ones, or those since the last update."""

    tokens: NDArray[np.int32]
    """Shape [T]."""
    logprobs: FloatArray | None
    """As in SampleColumns. Shape [T, 1 + k]; None if not requested."""
    logprob_tokens: NDArray[np.int32] | None
    """As in SampleColumns. Shape [T, 1 + k]; None if k = 0."""
    weight_versions: Spans
    """Versions of the model's own weights that sampled them; starts count from the first token here."""

    def __len__(self) -> int:
        return len(self.tokens)

    def since(self, offset: int) -> PartialSample:
        """Returns the tokens from one of them on."""
        if not offset:
            return self
        return PartialSample(
            tokens=self.tokens[offset:],
            logprobs=None if self.logprobs is None else self.logprobs[offset:],
            logprob_tokens=None if self.logprob_tokens is None else self.logprob_tokens[offset:],
            weight_versions=spans_from(self.weight_versions, offset),
        )

    @classmethod
    def concat(cls, parts: Sequence[PartialSample]) -> PartialSample:
        """Joins consecutive parts. At least one; all or none have logprobs."""
        spans: list[tuple[str, int]] = []
        start = 0
        for part in parts:
            for label, at in part.weight_versions:
                if not spans or spans[-1][0] != label:
                    spans.append((label, start + at))
            start += len(part)

        def joined(name: str) -> NDArray[np.generic] | None:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays)

        arrays = ("tokens", "logprobs", "logprob_tokens")
        return cls(**{name: joined(name) for name in arrays}, weight_versions=tuple(spans))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleColumns:
    """S samples with T tokens between them."""

    group: NDArray[np.int64]
    """Group of each sample: the router's id in transit, the prompt's index in a response. Shape [S]."""
    sample: NDArray[np.int32]
    """Index of the sample in its group. Shape [S]."""
    lengths: NDArray[np.int32]
    """Number of tokens of each sample. Shape [S], sum T."""
    tokens: NDArray[np.int32]
    """Sampled token ids, prompt excluded, samples concatenated. Shape [T]."""
    logprobs: FloatArray | None
    """Log p, nats: the sampled token first, then the k likeliest, then n named ones. Shape [T, 1 + k + n]; None if not
    requested."""
    logprob_tokens: NDArray[np.int32] | None
    """Token ids of `logprobs`. Shape [T, 1 + k + n]; None if k + n = 0: they are `tokens` then."""
    stop_reason: NDArray[np.uint8]
    """Index into STOP_REASONS. Shape [S]."""
    decoded: list[str]
    """Text of each sample, special tokens kept, a stop string cut off. S of them."""
    seed: NDArray[np.int64]
    """Seed of each sample's own random stream, NO_SEED for none. Shape [S]."""
    engine: list[str]
    """Name of the engine that sampled each sample. S of them."""
    adapter: list[str]
    """Label of the adapter version that sampled each sample, "" for the base model. S of them."""
    weight_versions: list[Spans]
    """Versions of the model's own weights that sampled each sample. S of them."""
    scores: dict[int, PromptScores] = field(default_factory=dict)
    """Prompt logprobs by group, if requested."""
    logprob_counts: NDArray[np.int32] | None = None
    """Number of logprobs at each position of each sample, where samples differ: the others are NaN, of token −1. Shape
    [S]."""
    whole_text: list[str] | None = None
    """`decoded` with special tokens, where that lacks them. S of them."""
    masks: list[SamplingMask | None] | None = None
    """S of them; None if not requested."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def logprobs_width(self) -> int:
        """1 + k + n; 0 if logprobs were not requested."""
        return 0 if self.logprobs is None else self.logprobs.shape[1]

    @property
    def layout(self) -> tuple[int, bool, bool]:
        """Which columns there are, and their width."""
        return (self.logprobs_width, self.whole_text is not None, self.masks is not None)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index in `tokens` of the first token of each sample. Shape [S]."""
        ends: NDArray[np.int64] = np.cumsum(self.lengths, dtype=np.int64)
        return ends - self.lengths

    @classmethod
    def concat(cls, parts: Sequence[SampleColumns]) -> SampleColumns:
        """Concatenates parts. At least one."""
        if len(parts) == 1:
            return parts[0]
        if len({part.layout for part in parts}) > 1:
            parts = _of_one_layout(parts)
        first = parts[0]
        scores: dict[int, PromptScores] = {}
        for part in parts:
            scores.update(part.scores)

        def joined(name: str) -> NDArray[np.generic] | None:
            return None if getattr(first, name) is None else np.concatenate([getattr(part, name) for part in parts])

        def listed(name: str) -> list[object] | None:
            return None if getattr(first, name) is None else [x for part in parts for x in getattr(part, name)]

        return cls(
            **{name: joined(name) for name in _ARRAYS},  # type: ignore[arg-type]
            **{name: listed(name) for name in _LISTS},  # type: ignore[arg-type]
            scores=scores,
        )

    def _widened(self, width: int) -> SampleColumns:
        """Pads logprobs to a width."""
        own, tokens = self.logprobs_width, len(self.tokens)
        logprobs = np.full((tokens, width), np.nan, np.float32)
        ids = None if width == 1 else np.full((tokens, width), -1, np.int32)
        if self.logprobs is not None:
            logprobs[:, :own] = self.logprobs
            if ids is not None:
                ids[:, :own] = self.tokens[:, None] if self.logprob_tokens is None else self.logprob_tokens
        counts = np.full(len(self), own, np.int32) if self.logprob_counts is None else self.logprob_counts
        return replace(self, logprobs=logprobs, logprob_tokens=ids, logprob_counts=counts)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> SampleColumns:
        """Selects rows, in the given order."""
        lengths = self.lengths[rows]
        at: slice | NDArray[np.int64]
        if len(rows) == 1:  # as in calls of one prompt: a quarter of the time
            start = int(self.lengths[: rows[0]].sum())
            at = slice(start, start + int(lengths[0]))
        else:
            moved = self.starts[rows] - (np.cumsum(lengths, dtype=np.int64) - lengths)
            # Old index of each new token: its offset within its sample is the same.
            at = np.arange(lengths.sum()) + np.repeat(moved, lengths)
        group = self.group[rows]
        return SampleColumns(
            group=group,
            sample=self.sample[rows],
            lengths=lengths,
            tokens=self.tokens[at],
            logprobs=None if self.logprobs is None else self.logprobs[at],
            logprob_tokens=None if self.logprob_tokens is None else self.logprob_tokens[at],
            stop_reason=self.stop_reason[rows],
            decoded=[self.decoded[row] for row in rows],
            seed=self.seed[rows],
            engine=[self.engine[row] for row in rows],
            adapter=[self.adapter[row] for row in rows],
            weight_versions=[self.weight_versions[row] for row in rows],
            scores={g: self.scores[g] for g in dict.fromkeys(group.tolist()) if g in self.scores},
            logprob_counts=None if self.logprob_counts is None else self.logprob_counts[rows],
            whole_text=None if self.whole_text is None else [self.whole_text[row] for row in rows],
            masks=None if self.masks is None else [self.masks[row] for row in rows],
        )

    def regrouped(self, indices: dict[int, int]) -> SampleColumns:
        """Selects the samples of the groups in `indices`, replaces ids by `indices[id]`, sorts by (index, sample)."""
        if len(self) == 1 and (alone := indices.get(int(self.group[0]))) is not None:
            scores = dict.fromkeys([alone], *self.scores.values()) if self.scores else {}
            return replace(self, group=np.full(1, alone, np.int64), scores=scores)
        index = np.array([indices.get(group, -1) for group in self.group.tolist()], np.int64)
        order = np.lexsort((self.sample, index))
        selected = self.take(order[index[order] >= 0])
        return replace(
            selected,
            group=index[order][index[order] >= 0],
            scores={indices[group]: scores for group, scores in selected.scores.items()},
        )

    def without(self, groups: set[int]) -> SampleColumns:
        """Selects the samples of all other groups."""
        return self.take(
            np.array([row for row, group in enumerate(self.group.tolist()) if group not in groups], np.int64)
        )


_ARRAYS = (
    "group",
    "sample",
    "lengths",
    "tokens",
    "logprobs",
    "logprob_tokens",
    "stop_reason",
    "seed",
    "logprob_counts",
)
_LISTS = ("decoded", "engine", "adapter", "weight_versions", "whole_text", "masks")


def _of_one_layout(parts: Sequence[SampleColumns]) -> list[SampleColumns]:
    """Pads the columns of parts to the same layout."""
    if len(widths := {part.logprobs_width for part in parts}) > 1:
        parts = [part._widened(max(widths)) for part in parts]
    texts = any(part.whole_text is not None for part in parts)
    masks = any(part.masks is not None for part in parts)
    return [
        replace(
            part,
            whole_text=(part.whole_text or part.decoded) if texts else None,
            masks=(part.masks or [None] * len(part)) if masks else None,
        )
        for part in parts
    ]
