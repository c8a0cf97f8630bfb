"""Checks samples against a second engine: is a logprob what another implementation says it is?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.errors import RequestError

if TYPE_CHECKING:
    from twinkle_serve.sampler.base import RunningSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How far two engines are apart on the tokens that one of them sampled."""

    tokens: int
    """Sampled tokens compared."""
    max_abs_difference: float
    """Largest |Δlogprob|, nats."""
    mean_abs_difference: float
    """Mean |Δlogprob|, nats."""
    kl: float
    """Estimate of KL(sampling engine ‖ other), nats a token: the mean of r − 1 − log r with r = p_other / p_sampled,
    which is never negative. An estimate of the true divergence where tokens were sampled at temperature 1 without
    truncation. Source: Schulman, "Approximating KL divergence" (2020), k3."""
    worst: tuple[int, int, int]
    """Where the largest difference is: (prompt index, sample index, token index)."""


def _by_name(by_version: dict[str, list[int]]) -> dict[str, list[int]]:
    """Rows by the name of their adapter: another service numbers its versions by itself.

    Raises:
        RequestError: rows of two versions of one name, which the other service cannot both mean by it.
    """
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


def verify(
    response: SampleResponse, against: RunningSampler, adapter_name: str | None, *, same_service: bool = False
) -> Verification:
    """See `RunningSampler.verify`.

    Args:
        same_service: whether `against` has the versions that the samples name.
    """
    columns = response.columns
    if columns.logprobs is None:
        raise RequestError("the response has no logprobs to verify. Sample with logprobs=0 or more.")
    if response.logprobs_mode != "raw_logprobs":
        raise RequestError(
            f"the response has {response.logprobs_mode}, which no score gives again. Sample with "
            "engine_args.logprobs_mode: raw_logprobs."
        )
    if not len(columns.tokens):
        raise RequestError("the response has no tokens to verify.")
    weights = {label for spans in columns.weight_versions for label, _ in spans}
    if len(weights) > 1:
        raise RequestError(
            f"the samples are of several versions of the model's weights, {', '.join(sorted(weights))}, and a sampler "
            "has one at a time. Score each on its own with score()."
        )
    by_adapter: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(columns.adapter):
        by_adapter[label if adapter_name is None else adapter_name].append(row)
    by_version = adapter_name is None and same_service
    if adapter_name is None and not same_service:
        by_adapter = _by_name(by_adapter)
    other = np.empty(len(columns.tokens), np.float64)
    for name, rows in by_adapter.items():
        sequences = [response.sequences[row] for row in rows]
        prompts = [response.prompts[int(columns.group[row])] for row in rows]
        whole = [np.concatenate([p, s.token_array]) for p, s in zip(prompts, sequences, strict=True)]
        # An adapter without a name has its path for one.
        path = name if name.startswith("/") and not by_version else None
        scored = against.score([{"input_ids": ids} for ids in whole], "" if path else name, path)
        has = {label for spans in scored.columns.weight_versions for label, _ in spans}
        if same_service and has != weights:
            raise RequestError(
                f"the samples are of weights {weights.pop()!r}, and the sampler has {', '.join(sorted(has))} by now."
            )
        if len(scored) != len(whole):
            raise RequestError("the other sampler's template leaves out what it should score. Raise its max_length.")
        if scored.logprobs_mode != response.logprobs_mode:
            raise RequestError(f"the other sampler returns {scored.logprobs_mode}, this one {response.logprobs_mode}.")
        for i, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            if scored.prompts[i].tolist() != whole[i].tolist():
                raise RequestError("the other sampler's template cuts what it scores. Raise its max_length.")
            tokens = len(sequence.token_array)
            other[sequence.start : sequence.start + tokens] = scored.columns.scores[i].logprobs[len(prompt) :]
    difference = other - columns.logprobs[:, 0].astype(np.float64)
    at = int(np.abs(difference).argmax())
    row = int(np.searchsorted(columns.starts, at, side="right")) - 1
    return Verification(
        tokens=len(difference),
        max_abs_difference=float(np.abs(difference).max()),
        mean_abs_difference=float(np.abs(difference).mean()),
        kl=float((np.exp(difference) - 1 - difference).mean()),
        worst=(
            response.prompt_indices[int(columns.group[row])],
            int(columns.sample[row]),
            at - int(columns.starts[row]),
        ),
    )
