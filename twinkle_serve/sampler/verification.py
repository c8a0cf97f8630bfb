"""Compares the logprobs of samples with those of a second engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format import SampledSequence, SampleResponse
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.errors import RequestError

if TYPE_CHECKING:
    from twinkle_serve.sampler.base import RunningSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Differences between two engines on tokens that one of them sampled."""

    tokens: int
    """Number of compared tokens."""
    max_abs_difference: float
    """Largest |Δlogprob|, nats."""
    mean_abs_difference: float
    """Mean |Δlogprob|, nats."""
    kl: float
    """Estimate of KL(sampling engine ‖ other), nats per token: the mean of r − 1 − log r with r = p_other / p_sampled,
    which is never negative. An estimate of the true divergence where tokens were sampled at temperature 1 without
    truncation. Source: Schulman, "Approximating KL divergence" (2020), k3."""
    worst: tuple[int, int, int]
    """Place of the largest difference: (prompt index, sample index, token index)."""


def verify(
    response: SampleResponse, against: RunningSampler, adapter_name: str | None, *, same_service: bool = False
) -> Verification:
    """See `RunningSampler.verify`.

    Args:
        same_service: whether `against` has the versions that the samples name.
    """
    columns = response.columns
    sampled = _sampled_logprobs(response)
    weights = _weights_version(response)
    other = np.empty(len(columns.tokens), np.float64)
    for name, rows in _rows_by_adapter(columns, adapter_name, same_service).items():
        sequences = [response.sequences[row] for row in rows]
        # An adapter that was given by its path has the path as its name.
        by_path = name.startswith("/") and not (adapter_name is None and same_service)
        scored = _score(response, sequences, against, "" if by_path else name, name if by_path else None)
        current = {label for spans in scored.columns.weight_versions for label, _ in spans}
        if same_service and current != {weights}:
            raise RequestError(
                f"the samples are of weights {weights!r}, and the sampler has {', '.join(sorted(current))} by now."
            )
        for i, sequence in enumerate(sequences):
            tokens = len(sequence.token_array)
            scores = scored.columns.scores[i].logprobs
            other[sequence.start : sequence.start + tokens] = scores[len(scores) - tokens :]
    difference = other - sampled
    worst = int(np.abs(difference).argmax())
    row = int(np.searchsorted(columns.starts, worst, side="right")) - 1
    return Verification(
        tokens=len(difference),
        max_abs_difference=float(np.abs(difference).max()),
        mean_abs_difference=float(np.abs(difference).mean()),
        kl=float((np.exp(difference) - 1 - difference).mean()),
        worst=(
            response.prompt_indices[int(columns.group[row])],
            int(columns.sample[row]),
            worst - int(columns.starts[row]),
        ),
    )


def _sampled_logprobs(response: SampleResponse) -> NDArray[np.float64]:
    """Returns the logprobs of the sampled tokens. Raises RequestError where they cannot be verified."""
    if not response.logprobs_mode:
        raise RequestError("the response was made by hand, and no engine's logprobs are in it to verify.")
    columns = response.columns
    if columns.logprobs is None:
        raise RequestError("the response has no logprobs to verify. Sample with logprobs=0 or more.")
    if response.logprobs_mode != "raw_logprobs":
        raise RequestError(
            f"the response has {response.logprobs_mode}, which scoring does not reproduce. Sample with "
            "engine_args.logprobs_mode: raw_logprobs."
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
    against: RunningSampler,
    adapter_name: str,
    adapter_path: str | None,
) -> SampleResponse:
    """Scores sequences of a response on another sampler, prompts included. Raises RequestError for other settings."""
    prompts = [response.prompts[int(response.columns.group[sequence.row])] for sequence in sequences]
    whole = [np.concatenate([p, s.token_array]) for p, s in zip(prompts, sequences, strict=True)]
    base_model = not (adapter_name or adapter_path)  # whatever the other sampler's default is
    scored = against.score([{"input_ids": ids} for ids in whole], adapter_name, adapter_path, use_base_model=base_model)
    if len(scored) != len(whole):
        raise RequestError("the other sampler's template leaves out sequences. Raise its max_length.")
    if scored.logprobs_mode != response.logprobs_mode:
        raise RequestError(f"the other sampler returns {scored.logprobs_mode}, this one {response.logprobs_mode}.")
    if any(scored.prompts[i].tolist() != ids.tolist() for i, ids in enumerate(whole)):
        raise RequestError("the other sampler's template cuts what it scores. Raise its max_length.")
    return scored
