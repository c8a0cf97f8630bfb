"""Compares the logprobs of samples with those of a second engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format import SampledSequence, SampleResponse
from twinkle_serve.data_format.response_list import ResponseList
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.errors import AdapterError, RequestError
from twinkle_serve.validation import finite_number, whole_number

if TYPE_CHECKING:
    from twinkle_serve.template import Template

FloatArray64: TypeAlias = NDArray[np.float64]


class Scorer(Protocol):
    """A sampler that scores sequences."""

    def score(
        self,
        inputs: Any,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        use_base_model: bool = False,
        track: str = "",
    ) -> SampleResponse:
        """See `RunningSampler.score`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDifference:
    """A token whose logprobs differ between two engines."""

    prompt_index: int
    """Index in the call of its prompt."""
    sample_index: int
    """Index of its sample among those of the prompt."""
    token_index: int
    """Index among the tokens of its sample."""
    token_id: int
    text: str
    """Text of the token; "" if the files of the model's tokenizer are not on this machine: none are downloaded. A part
    of a character is a replacement character."""
    sampled_logprob: float
    """Log p by the engine that sampled it, nats."""
    other_logprob: float
    """Log p by the other engine, nats."""
    difference: float
    """`other_logprob` − `sampled_logprob`, nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Differences between two engines on tokens that one of them sampled.

    n is the number of compared tokens, w = p_other / p_sampled the importance weight of one.
    """

    tokens: int
    """Number of compared tokens, n."""
    max_abs_difference: float
    """Largest |Δlogprob|, nats."""
    mean_abs_difference: float
    """Mean |Δlogprob|, nats."""
    kl: float
    """Estimate of KL(sampling engine ‖ other), nats per token: the mean of r − 1 − log r with r = p_other / p_sampled,
    which is never negative. An estimate of the true divergence where tokens were sampled at temperature 1 without
    truncation. Source: Schulman, "Approximating KL divergence" (2020), k3."""
    kl_k1: float
    """Another estimate of the same, nats per token: the mean of log p_sampled − log p_other. It varies more and may be
    negative. Far from `kl`, there are too few tokens for either, or they were sampled in another way. Source: as of
    `kl`, k1."""
    effective_sample_size: float
    """Share of the tokens that would tell as much if all had the same weight: (Σ w)² / (n Σ w²), from 1 / n to 1; 0
    if all weights are 0. Source: Kong, "A note on importance sampling using standardized weights" (1992)."""
    importance_weights: FloatArray64 = field(compare=False, repr=False)
    """w of each token, in the order of the response's `columns.tokens`: samples follow each other as in `sequences`.
    Shape [n], float64. Means weighted by them estimate those over tokens that the other engine samples."""
    worst: tuple[int, int, int]
    """Place of the largest difference: (prompt index, sample index, token index)."""
    worst_tokens: tuple[TokenDifference, ...] = field(repr=False)
    """The tokens with the largest |Δlogprob|, largest first: as many as `verify` was asked for, at most n."""

    def truncated_importance_weights(self, maximum: float) -> FloatArray64:
        """Returns min(w, maximum) of each token, which bounds the variance of a sum. Shape [n], float64.

        Source: Ionides, "Truncated importance sampling" (2008).

        Raises:
            RequestError: `maximum` is not a finite number above 0.
        """
        return np.minimum(self.importance_weights, _bound("maximum", maximum, above=0.0))

    def masked_importance_weights(self, low: float, high: float) -> FloatArray64:
        """Returns w of each token from `low` to `high`, bounds included, and 0 of the others. Shape [n], float64.

        Tokens on which the engines disagree have no gradient then. Source: IcePop, in "Every Step Evolves: Scaling
        Reinforcement Learning for Trillion-Scale Thinking Model" (arXiv 2510.18855).

        Raises:
            RequestError: not 0 ≤ low < high, or not finite.
        """
        lowest = finite_number("low", low)
        highest = _bound("high", high, above=lowest)
        if lowest < 0:
            raise RequestError(f"low must be at least 0, got {low}: no weight is negative.")
        weights = self.importance_weights
        return np.where((weights >= lowest) & (weights <= highest), weights, 0.0)


def _bound(name: str, value: object, *, above: float) -> float:
    number = finite_number(name, value)
    if number <= above:
        raise RequestError(f"{name} must be above {above:g}, got {number:g}.")
    return number


def verify(
    response: SampleResponse,
    against: Scorer,
    adapter_name: str | None,
    worst: int,
    *,
    track: str = "",
    same_service: bool = False,
    templates: Sequence[Callable[[], Template | None]] = (),
) -> Verification:
    """See `RunningSampler.verify`.

    Args:
        same_service: whether `against` has the versions that the samples name.
        templates: return a template that decodes tokens, or None; the first one is used.
    """
    if isinstance(response, ResponseList):
        try:
            response = response.whole()
        except ValueError as error:
            raise RequestError(f"the list of responses cannot be verified: {error}") from error
    if not isinstance(response, SampleResponse):
        raise RequestError(f"response must be a SampleResponse, got {type(response).__name__}.")
    if adapter_name is not None and not isinstance(adapter_name, str):
        raise AdapterError(f"adapter_name must be a string, got {adapter_name!r}.")
    count = whole_number("worst", worst, 0)
    sampled = _sampled_logprobs(response)
    other = _other_logprobs(response, against, adapter_name, track, same_service)
    difference = other - sampled
    order = np.argsort(-np.abs(difference), kind="stable")
    return Verification(
        tokens=len(difference),
        max_abs_difference=float(np.abs(difference).max()),
        mean_abs_difference=float(np.abs(difference).mean()),
        kl=float((np.exp(difference) - 1 - difference).mean()),
        kl_k1=float(-difference.mean()),
        effective_sample_size=_effective_share(difference),
        importance_weights=np.exp(difference),
        worst=_place(response, int(order[0])),
        worst_tokens=_worst_tokens(response, order[:count], sampled, other, templates),
    )


def _effective_share(log_weights: FloatArray64) -> float:
    """Returns (Σ w)² / (n Σ w²); 0 if all weights are 0."""
    largest = log_weights.max()
    if not np.isfinite(largest):
        return 0.0
    weights = np.exp(log_weights - largest)  # the ratio is the same, and no square overflows
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))


def _worst_tokens(
    response: SampleResponse,
    order: NDArray[np.intp],
    sampled: FloatArray64,
    other: FloatArray64,
    templates: Sequence[Callable[[], Template | None]],
) -> tuple[TokenDifference, ...]:
    template = next((found for find in templates if (found := find()) is not None), None) if len(order) else None
    worst = []
    for at in order.tolist():
        prompt, sample, index = _place(response, at)
        token = int(response.columns.tokens[at])
        worst.append(
            TokenDifference(
                prompt_index=prompt,
                sample_index=sample,
                token_index=index,
                token_id=token,
                text="" if template is None else template.decode([token]),
                sampled_logprob=float(sampled[at]),
                other_logprob=float(other[at]),
                difference=float(other[at] - sampled[at]),
            )
        )
    return tuple(worst)


def _place(response: SampleResponse, at: int) -> tuple[int, int, int]:
    """Returns the prompt's index in the call, the sample's index and the token's index, by index among all tokens."""
    columns = response.columns
    row = int(np.searchsorted(columns.starts, at, side="right")) - 1
    prompt = response.prompt_indices[int(columns.group[row])]
    return prompt, int(columns.sample[row]), at - int(columns.starts[row])


def _other_logprobs(
    response: SampleResponse, against: Scorer, adapter_name: str | None, track: str, same_service: bool
) -> FloatArray64:
    """Scores the samples on the other sampler. Returns the logprobs of their tokens, as they are in the columns."""
    columns, weights = response.columns, _weights_version(response)
    other = np.empty(len(columns.tokens), np.float64)
    for name, rows in _rows_by_adapter(columns, adapter_name, same_service).items():
        sequences = [response.sequences[row] for row in rows]
        # An adapter that was given by its path has the path as its name.
        by_path = name.startswith("/") and not (adapter_name is None and same_service)
        scored = _score(response, sequences, against, "" if by_path else name, name if by_path else None, track)
        current = {label for spans in scored.columns.weight_versions for label, _ in spans}
        if same_service and current != {weights}:
            raise RequestError(
                f"the samples are of weights {weights!r}, and the sampler has {', '.join(sorted(current))} by now"
                f"{f' in track {track!r}' if track else ''}."
            )
        for i, sequence in enumerate(sequences):
            tokens = len(sequence.token_array)
            scores = scored.columns.scores[i].logprobs
            other[sequence.start : sequence.start + tokens] = scores[len(scores) - tokens :]
    return other


def _sampled_logprobs(response: SampleResponse) -> NDArray[np.float64]:
    """Returns the logprobs of the sampled tokens. Raises RequestError where they cannot be verified."""
    if not response.logprobs_mode:
        raise RequestError("the response was made by hand, and no engine's logprobs are in it to verify.")
    columns = response.columns
    if columns.logprobs is None:
        raise RequestError("the response has no logprobs to verify. Sample with logprobs=0 or more.")
    if (without := columns.logprob_counts) is not None and not without.all():
        rows = np.flatnonzero(without == 0).tolist()
        raise RequestError(f"samples {rows} of the response have no logprobs to verify. Verify the others alone.")
    if response.logprobs_mode != "raw_logprobs" or response.logprobs_are_masked:
        masked = " under the mask of structured_outputs" if response.logprobs_are_masked else ""
        raise RequestError(
            f"the response has {response.logprobs_mode}{masked}, which scoring does not reproduce. Sample with "
            "logprobs_mode='raw_logprobs', or set engine_args.logprobs_mode."
        )
    if not len(columns.tokens):
        raise RequestError("the response has no tokens to verify.")
    return columns.logprobs[:, 0].astype(np.float64)


def _weights_version(response: SampleResponse) -> str:
    """Returns the version of the model's own weights that sampled a response. Raises RequestError for several."""
    weights = {label for spans in response.columns.weight_versions for label, _ in spans}
    if len(weights) > 1:
        raise RequestError(
            f"the samples are of several versions of the model's weights, {', '.join(sorted(weights))}, and a sampler "
            "has one at a time. Score each on its own with score()."
        )
    return weights.pop()


def _rows_by_adapter(columns: SampleColumns, adapter_name: str | None, same_service: bool) -> dict[str, list[int]]:
    """Returns the rows of samples by the adapter to score them with: its version on the same service, else its name.

    Raises:
        RequestError: rows of two versions of one name, of which another service has one.
    """
    by_version: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(columns.adapter):
        by_version[label if adapter_name is None else adapter_name].append(row)
    if adapter_name is not None or same_service:
        return by_version
    by_name: dict[str, list[int]] = {}
    for label, rows in by_version.items():
        name = label.rpartition("@")[0]
        if name in by_name:
            versions = ", ".join(other for other in by_version if other.rpartition("@")[0] == name)
            raise RequestError(
                f"the samples are of {versions}, and the other sampler has one {name!r}. Verify each apart, with "
                "adapter_name=…."
            )
        by_name[name] = rows
    return by_name


def _score(
    response: SampleResponse,
    sequences: Sequence[SampledSequence],
    against: Scorer,
    adapter_name: str,
    adapter_path: str | None,
    track: str,
) -> SampleResponse:
    """Scores sequences of a response on another sampler, prompts included. Raises RequestError for other settings."""
    prompts = [response.prompts[int(response.columns.group[sequence.row])] for sequence in sequences]
    whole = [np.concatenate([p, s.token_array]) for p, s in zip(prompts, sequences, strict=True)]
    base_model = not (adapter_name or adapter_path)  # whatever the other sampler's default is
    inputs = [{"input_ids": ids} for ids in whole]
    scored = against.score(inputs, adapter_name, adapter_path, use_base_model=base_model, track=track)
    if len(scored) != len(whole):
        raise RequestError("the other sampler's template leaves out sequences. Raise its max_length.")
    if scored.logprobs_mode != response.logprobs_mode:
        raise RequestError(f"the other sampler returns {scored.logprobs_mode}, this one {response.logprobs_mode}.")
    if any(scored.prompts[i].tolist() != ids.tolist() for i, ids in enumerate(whole)):
        raise RequestError("the other sampler's template cuts what it scores. Raise its max_length.")
    return scored
