"""Samples scored by a second sampler: what their logprobs' differences say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.local_sampler import QUESTION, make
from tests.support.responses import columns, response
from twinkle_serve import SampleResponse, hub
from twinkle_serve.data_format.response_list import ResponseList
from twinkle_serve.data_format.samples import PromptScores
from twinkle_serve.errors import RequestError
from twinkle_serve.sampler import RunningSampler, Verification
from twinkle_serve.template import Template

TEXTS = [["abc", "d"], ["", "ef"]]
DIFFERENCES = {"a": 0.0, "b": 0.5, "c": -2.0, "d": 0.25, "e": -0.5, "f": 1.0}
"""log p_other − log p_sampled of each token."""
LOG_WEIGHTS = np.array(list(DIFFERENCES.values()))
SAMPLED = -3.0


class Second(RunningSampler):
    """A sampler that scores each token with its own logprob."""

    def __init__(self, logprobs: dict[str, float], template: Template | None = None) -> None:
        self.logprobs = {ord(character): value for character, value in logprobs.items()}
        self.found = template
        self._client: Any = None

    def score(self, inputs: Any, *arguments: Any, **options: Any) -> SampleResponse:
        ids = [item["input_ids"] for item in inputs]
        scored = response([columns(i, [""]) for i in range(len(ids))], inputs, ids)
        for i, row in enumerate(ids):
            values = np.array([np.nan, *(self.logprobs.get(token, 0.0) for token in row[1:].tolist())], np.float32)
            none = np.empty((len(row), 0))
            scored.columns.scores[i] = PromptScores(
                logprobs=values, top_tokens=none.astype(np.int32), top_logprobs=none.astype(np.float32)
            )
        return scored

    def _find_template(self) -> Template | None:
        return self.found


@pytest.fixture(scope="module")
def sampler() -> Iterator[RunningSampler]:
    made, _ = make()
    yield made
    made.shutdown()


@pytest.fixture
def sampled() -> SampleResponse:
    """Two prompts, the third and the fifth of their call; one sample has no tokens."""
    made = response([columns(i, part) for i, part in enumerate(TEXTS)], [{}, {}], [[1, 2], [3]])
    logprobs = np.full((len(made.columns.tokens), 1), SAMPLED, np.float32)
    return replace(made, prompt_indices=(2, 4), columns=replace(made.columns, logprobs=logprobs))


def differing(log_weights: dict[str, float]) -> Second:
    return Second({character: SAMPLED + value for character, value in log_weights.items()})


@pytest.fixture
def verification(sampler: RunningSampler, sampled: SampleResponse) -> Verification:
    return sampler.verify(sampled, against=differing(DIFFERENCES))


def test_divergence_is_estimated_in_two_ways(verification: Verification) -> None:
    """From the same tokens: k3, which is never negative, and k1, which may be."""
    ratios = np.exp(LOG_WEIGHTS)
    assert verification.tokens == 6 and verification.max_abs_difference == 2.0
    assert verification.mean_abs_difference == pytest.approx(np.abs(LOG_WEIGHTS).mean())
    assert verification.kl == pytest.approx((ratios - 1 - LOG_WEIGHTS).mean())
    assert verification.kl_k1 == pytest.approx(-LOG_WEIGHTS.mean())


def test_estimates_agree_on_the_true_divergence(sampler: RunningSampler) -> None:
    """Of tokens that are drawn from one distribution and scored by another."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    drawn = "".join(np.random.default_rng(0).choice(list("abc"), p=p, size=20_000))
    made = response([columns(0, [drawn])], [{}], [[1]])
    known = dict(zip("abc", np.log(p), strict=True))
    logprobs = np.array([known[character] for character in drawn], np.float32)[:, None]
    made = replace(made, columns=replace(made.columns, logprobs=logprobs))
    result = sampler.verify(made, against=Second(dict(zip("abc", np.log(q).tolist(), strict=True))))
    truth = float((p * np.log(p / q)).sum())
    assert result.kl == pytest.approx(truth, rel=0.05) and result.kl_k1 == pytest.approx(truth, rel=0.2)
    assert result.importance_weights.mean() == pytest.approx(1.0, rel=0.01)
    assert result.effective_sample_size == pytest.approx(1 / (q**2 / p).sum(), rel=0.01)


def test_importance_weights_are_in_the_order_of_the_tokens(verification: Verification, sampled: SampleResponse) -> None:
    """p_other / p_sampled of each, samples after each other."""
    text = "".join(map(chr, sampled.columns.tokens))
    assert text == "".join(sequence.decoded for sequence in sampled.sequences) == "abcdef"
    assert verification.importance_weights.tolist() == pytest.approx(np.exp(LOG_WEIGHTS).tolist())


def test_weights_are_truncated_and_masked(verification: Verification) -> None:
    """Truncated: not above the bound. Masked: 0 outside the bounds, unchanged inside."""
    weights = verification.importance_weights
    assert verification.truncated_importance_weights(1.5).tolist() == np.minimum(weights, 1.5).tolist()
    masked = verification.masked_importance_weights(0.5, 2.0)
    assert masked.tolist() == [weight if 0.5 <= weight <= 2 else 0 for weight in weights.tolist()]
    assert np.count_nonzero(masked) == 4
    exact = verification.masked_importance_weights(1.0, float(weights[1]))
    assert exact[:2].tolist() == weights[:2].tolist(), "the bounds are inside"
    assert weights.tolist() == pytest.approx(np.exp(LOG_WEIGHTS).tolist()), "unchanged"


@pytest.mark.parametrize(
    ("bounds", "error"),
    [
        ((0,), "maximum must be above 0, got 0"),
        ((-1.0,), "maximum must be above 0, got -1"),
        ((float("inf"),), "maximum must be finite"),
        ((None,), "maximum must be a number"),
        ((-0.5, 2.0), "low must be at least 0, got -0.5"),
        ((2.0, 0.5), "high must be above 2, got 0.5"),
        ((1.0, 1.0), "high must be above 1, got 1"),
        ((0.5, float("nan")), "high must be finite"),
        ((float("nan"), 2.0), "low must be finite"),
        (("0.5", 2.0), "low must be a number"),
    ],
)
def test_invalid_bounds_are_refused(verification: Verification, bounds: tuple[Any, ...], error: str) -> None:
    """Every token would have the same weight, or none."""
    calls: dict[int, Any] = {
        1: verification.truncated_importance_weights,
        2: verification.masked_importance_weights,
    }
    with pytest.raises(RequestError, match=error):
        calls[len(bounds)](*bounds)


@pytest.mark.parametrize(
    ("log_weights", "share"),
    [
        (dict.fromkeys("abcdef", 0.0), 1.0),
        (dict.fromkeys("abcdef", -700.0), 1.0),
        ({**dict.fromkeys("abcde", -80.0), "f": 0.0}, 1 / 6),
        ({**dict.fromkeys("abcd", -np.inf), "e": 0.0, "f": 0.0}, 2 / 6),
        (dict.fromkeys("abcdef", -np.inf), 0.0),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinite differences
def test_effective_sample_size_is_a_share_of_the_tokens(
    sampler: RunningSampler, sampled: SampleResponse, log_weights: dict[str, float], share: float
) -> None:
    """1 if all weigh the same, however little; 1 / n if one has all the weight."""
    result = sampler.verify(sampled, against=differing(log_weights))
    assert result.effective_sample_size == pytest.approx(share)


def test_worst_tokens_are_named(sampler: RunningSampler, sampled: SampleResponse) -> None:
    """Largest difference first, each with its place in the call, its text and both logprobs."""
    template = Template(hub.DEMO)
    other = differing(DIFFERENCES)
    result = sampler.verify(sampled, against=other, worst=3)
    places = [(token.prompt_index, token.sample_index, token.token_index) for token in result.worst_tokens]
    assert places == [(2, 0, 2), (4, 1, 1), (2, 0, 1)] and result.worst == places[0]
    assert [token.token_id for token in result.worst_tokens] == [ord("c"), ord("f"), ord("b")]
    assert [token.difference for token in result.worst_tokens] == [-2.0, 1.0, 0.5]
    for token in result.worst_tokens:
        assert token.sampled_logprob == SAMPLED and token.other_logprob == SAMPLED + token.difference
        assert token.text == template.decode([token.token_id]) != ""
    assert len(sampler.verify(sampled, against=other).worst_tokens) == 6, "there are no more"
    assert sampler.verify(sampled, against=other, worst=0).worst_tokens == ()
    part = sampler.verify(sampled[1], against=other, worst=1)
    assert (part.worst, part.worst_tokens[0].token_id) == ((4, 1, 1), ord("f"))


def test_texts_are_empty_if_no_tokenizer_is_here(sampled: SampleResponse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are there all the same, and nothing is downloaded. Either sampler's template is good."""
    sampler, _ = make()
    monkeypatch.setattr(hub, "_huggingface", None)
    for model in ("/nowhere/model", "hf://nobody/nothing"):
        monkeypatch.setattr(
            sampler, "status", lambda model=model: {"model_id": model, "template": {"name": "Template"}}
        )
        result = sampler.verify(sampled, against=differing(DIFFERENCES))
        assert [token.text for token in result.worst_tokens] == [""] * 6 and result.kl > 0
    other = differing(DIFFERENCES)
    other.found = Template(hub.DEMO)
    assert all(token.text for token in sampler.verify(sampled, against=other).worst_tokens)
    sampler.shutdown()


def test_list_of_responses_is_verified_as_a_whole(sampler: RunningSampler) -> None:
    """A sampler agrees with itself."""
    made = sampler.sample([QUESTION] * 2, {"max_tokens": 5, "ignore_eos": True}, num_samples=2)
    result = sampler.verify(ResponseList(made), against=sampler)
    assert result == sampler.verify(made, against=sampler) and result.tokens == 20
    assert result.effective_sample_size == pytest.approx(1.0) and np.allclose(result.importance_weights, 1.0)
    assert abs(result.kl_k1) < 1e-5 and "importance_weights" not in repr(result)


@pytest.mark.parametrize("worst", [-1, 1.5, "3", True, None])
def test_invalid_number_of_worst_tokens_is_refused(
    sampler: RunningSampler, sampled: SampleResponse, worst: Any
) -> None:
    """Before anything is scored."""
    with pytest.raises(RequestError, match="worst must be"):
        sampler.verify(sampled, against=Second({}), worst=worst)
