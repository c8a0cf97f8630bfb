"""What engines produce and the wire carries: samples as numpy columns.

A Python list of a million numbers costs more to pickle than to sample; columns cost a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.weights import Spans

IntArray: TypeAlias = NDArray[np.int32] | NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float32]
StopReason: TypeAlias = Literal["length", "stop", "abort", "error"]

STOP_REASONS: tuple[StopReason, ...] = ("length", "stop", "abort", "error")
"""Code in `SampleColumns.stop_reason` to name."""

NO_SEED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """Logprobs of one prompt's own tokens, P of them. Position 0 has none: NaN, and token −1."""

    logprobs: FloatArray
    """Shape [P], nats."""
    top_tokens: NDArray[np.int32]
    """The k likeliest tokens at each position, best first. Shape [P, k]; k may be 0."""
    top_logprobs: FloatArray
    """Shape [P, k], nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialSample:
    """Tokens of a sample that has not ended, T of them: its first ones, or what it has gained since."""

    tokens: NDArray[np.int32]
    """Shape [T]."""
    logprobs: FloatArray | None
    """As in SampleColumns. Shape [T, 1 + k]; None if not asked for."""
    logprob_tokens: NDArray[np.int32] | None
    """As in SampleColumns. Shape [T, 1 + k]; None if k = 0."""
    weight_versions: Spans
    """Versions of the model's own weights that sampled them; starts count from the first token here."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def concat(cls, parts: Sequence[PartialSample]) -> PartialSample:
        """Parts that follow each other. At least one, all with logprobs or none."""
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
    """Which group a sample is of: the router's id on the way, the prompt's index in a response. Shape [S]."""
    sample: NDArray[np.int32]
    """Index of the sample in its group. Shape [S]."""
    lengths: NDArray[np.int32]
    """Tokens of each sample. Shape [S], sum T."""
    tokens: NDArray[np.int32]
    """Sampled token ids, prompt excluded, samples one after the other. Shape [T]."""
    logprobs: FloatArray | None
    """Log p, nats: the sampled token first, then the k likeliest. Shape [T, 1 + k]; None if not asked for."""
    logprob_tokens: NDArray[np.int32] | None
    """Token ids of `logprobs`. Shape [T, 1 + k]; None if k = 0, when they are `tokens`."""
    stop_reason: NDArray[np.uint8]
    """Index into STOP_REASONS. Shape [S]."""
    decoded: list[str]
    """Text of each sample, special tokens kept, a stop string cut off. S of them."""
    seed: NDArray[np.int64]
    """Seed of the sample's own random stream, NO_SEED where there was none. Shape [S]."""
    engine: list[str]
    """Which engine sampled it. S of them."""
    adapter: list[str]
    """Label of the adapter version that sampled it, "" for the base model. S of them."""
    weight_versions: list[Spans]
    """Versions of the model's own weights that sampled it. S of them."""
    scores: dict[int, PromptScores] = field(default_factory=dict)
    """By group, where prompt logprobs were asked for."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def logprobs_width(self) -> int:
        """1 + k; 0 where logprobs were not asked for."""
        return 0 if self.logprobs is None else self.logprobs.shape[1]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each sample begins in `tokens`. Shape [S]."""
        ends: NDArray[np.int64] = np.cumsum(self.lengths, dtype=np.int64)
        return ends - self.lengths

    @classmethod
    def concat(cls, parts: Sequence[SampleColumns]) -> SampleColumns:
        """All parts, one after the other. At least one, of one `logprobs_width`."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        scores: dict[int, PromptScores] = {}
        for part in parts:
            scores.update(part.scores)

        def joined(name: str) -> NDArray[np.generic] | None:
            return None if getattr(first, name) is None else np.concatenate([getattr(part, name) for part in parts])

        arrays = ("group", "sample", "lengths", "tokens", "logprobs", "logprob_tokens", "stop_reason", "seed")
        return cls(
            **{name: joined(name) for name in arrays},  # type: ignore[arg-type]
            decoded=[text for part in parts for text in part.decoded],
            engine=[engine for part in parts for engine in part.engine],
            adapter=[adapter for part in parts for adapter in part.adapter],
            weight_versions=[spans for part in parts for spans in part.weight_versions],
            scores=scores,
        )

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> SampleColumns:
        """The given rows, in the given order."""
        lengths = self.lengths[rows]
        moved = self.starts[rows] - (np.cumsum(lengths, dtype=np.int64) - lengths)
        # Where each token is: as far from where its sample begins as it is to be.
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
        )

    def regrouped(self, indices: dict[int, int]) -> SampleColumns:
        """The samples of the groups in `indices`, ids replaced by `indices[id]`, sorted by (index, sample)."""
        index = np.array([indices.get(group, -1) for group in self.group.tolist()], np.int64)
        order = np.lexsort((self.sample, index))
        mine = self.take(order[index[order] >= 0])
        return replace(
            mine,
            group=index[order][index[order] >= 0],
            scores={indices[group]: scores for group, scores in mine.scores.items()},
        )

    def without(self, groups: set[int]) -> SampleColumns:
        """The samples of all other groups."""
        return self.take(
            np.array([row for row, group in enumerate(self.group.tolist()) if group not in groups], np.int64)
        )
