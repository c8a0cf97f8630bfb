"""Logprobs and versions of weights in input features: of each sampled token, through all turns of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.columnar import columnar
from tests.support.responses import columns, response
from tests.support.turns import USER, after, feature_of, prompt_of, tokens_of
from twinkle_serve import conventions, hub
from twinkle_serve.data_format.messages import Turn
from twinkle_serve.data_format.weights import SampledSpan
from twinkle_serve.errors import PromptError
from twinkle_serve.template import Template

IDS = [61, 62, 63, 64]
SPAN = SampledSpan(weights="initial", adapter="", start=1, end=3)
TURN: dict[str, Any] = {
    "input_ids": IDS,
    "labels": [62, 63, -100, -100],
    "logprobs": [-0.5, -0.25, 0.0, 0.0],
    "weight_versions": [SPAN],
}
"""A feature of which tokens 1 and 2 were sampled."""


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(hub.DEMO)


@pytest.fixture
def twinkles() -> Iterator[None]:
    conventions.follow_twinkle()
    yield
    conventions.follow_twinkle(False)


def sampled(item: Any, template: Template, text: str = "ab", **fields: Any) -> dict[str, Any]:
    """The feature of a sample of the weights "now" with logprobs −1, −2, …, unless `fields` have others."""
    count = len(tokens_of(template, text))
    logprobs = -np.arange(1, count + 1, dtype=np.float32)[:, None]
    own: dict[str, Any] = {"logprobs": logprobs, "weight_versions": [(("now", 0),)]}
    return feature_of(prompt_of(item, template), template, text, **{**own, **fields})


def as_parquet(feature: dict[str, Any]) -> dict[str, Any]:
    return {key: columnar(value) for key, value in feature.items()}


@pytest.mark.parametrize("stored", [dict, lambda f: json.loads(json.dumps(f)), as_parquet], ids=["as is", "json", "np"])
def test_each_turn_keeps_its_logprobs_and_versions(template: Template, stored: Any) -> None:
    """At the positions of their labels, through storage too; positions between the turns have none."""
    feature: dict[str, Any] = {"messages": [USER]}
    expected: dict[int, float] = {}
    spans = []
    for turn, text in enumerate(("2<|im_end|>", "34<|im_end|>", "5")):
        start = len(prompt_of(feature, template).ids)
        count = len(tokens_of(template, text))
        values = np.linspace(-turn - 0.9, -turn - 0.1, count, dtype=np.float32)
        feature = sampled(
            feature, template, text, logprobs=values[:, None], weight_versions=[((f"step-{turn}", 0),)], adapter=["a@1"]
        )
        expected |= {start - 1 + i: float(value) for i, value in enumerate(values)}
        spans.append({"weights": f"step-{turn}", "adapter": "a@1", "start": start, "end": start + count})
        assert feature["logprobs"] == [expected.get(i, 0.0) for i in range(len(feature["labels"]))]
        assert [i for i, label in enumerate(feature["labels"]) if label != -100] == sorted(expected)
        assert feature["weight_versions"] == spans
        feature = after(stored(feature), USER) if stored is not as_parquet else stored(after(feature, USER))


def test_spans_of_a_sample_name_each_version_of_the_weights(template: Template) -> None:
    """Those that changed while it ran; a version without a token is left out.

    A sample that continues another one of the same weights and adapter is in one span with it.
    """
    versions = [(("one", 0), ("two", 2), ("three", 3))]
    spans = sampled({"input_ids": IDS}, template, "abc", weight_versions=versions)["weight_versions"]
    assert [(span["weights"], span["start"], span["end"]) for span in spans] == [("one", 4, 6), ("two", 6, 7)]
    assert sampled({"input_ids": IDS}, template, "")["weight_versions"] == []
    feature = sampled({"input_ids": IDS}, template, "a")
    for text, adapter, ends in (("b", "", [6]), ("", "", [6]), ("c", "a@1", [6, 7]), ("d", "a@1", [6, 8])):
        feature = sampled(feature, template, text, adapter=[adapter])
        assert [span["end"] for span in feature["weight_versions"]] == ends


def test_features_without_logprobs_have_no_such_column(template: Template) -> None:
    """Neither the call's nor the input's. One of both is enough: tokens of the other have 0."""
    silent: dict[str, Any] = {"logprobs": None}
    assert "logprobs" not in sampled({"input_ids": IDS}, template, **silent)
    assert "logprobs" not in sampled({"input_ids": IDS, "labels": TURN["labels"]}, template, **silent)
    assert sampled(TURN, template, **silent)["logprobs"] == [-0.5, -0.25, 0.0, 0.0, 0.0, 0.0]
    labelled = {"input_ids": IDS, "labels": TURN["labels"]}
    assert sampled(labelled, template)["logprobs"] == [0.0, 0.0, 0.0, -1.0, -2.0, 0.0]


def test_position_without_a_label_has_no_logprob(template: Template) -> None:
    """A trainer may take labels away from a turn, or from all."""
    masked = {**TURN, "labels": [62, -100, -100, -100]}
    assert sampled(masked, template)["logprobs"] == [-0.5, 0.0, 0.0, -1.0, -2.0, 0.0]
    unlabelled = {key: value for key, value in TURN.items() if key != "labels"}
    assert sampled(unlabelled, template)["logprobs"] == [0.0, 0.0, 0.0, -1.0, -2.0, 0.0]
    assert sampled(unlabelled, template)["weight_versions"][0] == SPAN


@pytest.mark.parametrize(
    "logprobs", [np.array(TURN["logprobs"]), torch.tensor(TURN["logprobs"]), np.array([-1, -2, 0, 0])]
)
def test_logprobs_may_be_numbers_of_any_library(logprobs: Any, template: Template) -> None:
    """They come back as Python's."""
    kept = sampled({**TURN, "logprobs": logprobs}, template)["logprobs"]
    assert kept[:4] == [*logprobs.tolist()[:2], 0.0, -1.0] and {type(value) for value in kept} == {float}


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"logprobs": [-0.5]}, r"logprobs has shape \(1,\) and type float64, input_ids \(4,\)"),
        ({"logprobs": np.zeros((4, 1))}, r"logprobs has shape \(4, 1\)"),
        ({"logprobs": [None, -0.5, -0.25, 0.0]}, r"logprobs has shape \(4,\) and type object"),
        ({"logprobs": ["a", "b", "c", "d"]}, r"logprobs has shape \(4,\) and type <U1"),
        ({"logprobs": [{"61": -0.5}] * 4}, r"logprobs has shape \(4,\) and type object"),
        ({"logprobs": [[[61, -0.5]], [[62, -0.5]]]}, r"logprobs has shape \(2, 1, 2\)"),
        ({"logprobs": [-0.5, float("nan"), 0.0, 0.0]}, "logprobs has nan at index 1, and must be finite"),
        ({"logprobs": [-0.5, 0.0, float("-inf"), 0.0]}, "logprobs has -inf at index 2, and must be finite"),
        ({"logprobs": [0.0, -0.5, -0.25, -0.125]}, r"logprobs ends with -0.125, .* it must be 0. Roll logprobs left"),
        ({"weight_versions": "initial"}, "weight_versions was not written by new_input_feature"),
        ({"weight_versions": [["initial", 1, 3]]}, "weight_versions was not written by new_input_feature"),
        ({"weight_versions": [{**SPAN, "adapter": None}]}, "weight_versions was not written by new_input_feature"),
        ({"weight_versions": [{**SPAN, "start": -1}]}, "weight_versions: start must be at least 0, got -1"),
        ({"weight_versions": [{**SPAN, "end": 0}]}, "weight_versions: end must be at least 1, got 0"),
        ({"weight_versions": [{**SPAN, "start": 1.5}]}, "weight_versions: start must be a whole number"),
        ({"weight_versions": [SPAN, {**SPAN, "start": 2}]}, "weight_versions has a span that ends at 3 before one"),
    ],
)
def test_invalid_columns_about_sampled_tokens_are_refused(
    columns: dict[str, Any], error: str, template: Template
) -> None:
    """By name: a trainer would weigh tokens with the logprobs of others."""
    with pytest.raises(PromptError, match=rf"inputs\[0\].{error}"):
        prompt_of({**TURN, **columns}, template)


@pytest.mark.parametrize(
    ("strategy", "label", "logprob", "span"),
    [("left", 64, -0.125, {"start": 0, "end": 1}), ("right", 62, -0.5, {"start": 1, "end": 2})],
)
def test_columns_about_sampled_tokens_are_cut_with_them(
    strategy: Any, label: int, logprob: float, span: dict[str, int], template: Template
) -> None:
    """On either side, as labels are: the first token that is left has nothing before it that predicts it."""
    item = {**TURN, "labels": [62, 63, 64, -100], "logprobs": [-0.5, -0.25, -0.125, 0.0]}
    feature = sampled(item, Template(hub.DEMO, max_length=2, truncation_strategy=strategy), "a")
    (sample,) = tokens_of(template, "a")
    assert feature["labels"] == [label, sample, -100] and feature["logprobs"] == [logprob, -1.0, 0.0]
    assert feature["weight_versions"] == [{**SPAN, **span}, {**SPAN, "weights": "now", "start": 2, "end": 3}]
    alone = prompt_of(item, Template(hub.DEMO, max_length=1, truncation_strategy=strategy))
    assert alone.turn.weight_versions == ()


def test_versions_of_tokens_that_the_caller_removed_are_dropped(template: Template) -> None:
    """From the end of the ids, as the token that ends a turn often is."""
    for kept, spans in ((4, [SPAN]), (2, [{**SPAN, "end": 2}]), (1, [])):
        feature = sampled({"input_ids": IDS[:kept], "weight_versions": [SPAN]}, template)
        assert feature["weight_versions"][:-1] == spans


def test_appended_messages_leave_logprobs_where_they_are(template: Template) -> None:
    """Tokens that follow the sampled ones have none."""
    feature = sampled({"messages": [USER]}, template, "2<|im_end|>")
    turn = prompt_of(after(feature, USER), template).turn
    assert turn.labels is not None and turn.logprobs is not None and len(turn.logprobs) == len(turn.labels)
    assert turn.logprobs[turn.labels != -100].tolist() == [-1.0, -2.0]
    assert not turn.logprobs[turn.labels == -100].any()


def test_twinkles_features_have_twinkles_keys(template: Template, twinkles: None) -> None:
    """Its rollouts append tokens to the columns that they know. Columns of the input are kept all the same."""
    keys = {"input_ids", "labels", "attention_mask", "position_ids", "length"}
    assert set(sampled({"input_ids": IDS}, template)) == keys
    assert set(sampled({"messages": [USER]}, template)) == keys | {"messages", "encoded"}
    assert sampled(TURN, template)["logprobs"] == [-0.5, -0.25, 0.0, -1.0, -2.0, 0.0]


def test_rollouts_append_tokens_without_logprobs(template: Template) -> None:
    """They put labels back to the tokens' positions, append both, and have the feature finished."""
    longer = {**TURN, "input_ids": [*IDS, 65, 66], "labels": [-100, 62, 63, -100, -100, -100]}
    (finished,) = template._invoke_post_pipeline([longer])
    assert finished["labels"].tolist() == [62, 63, -100, -100, -100, -100]
    assert finished["logprobs"].tolist() == [-0.5, -0.25, 0.0, 0.0, 0.0, 0.0] and finished["weight_versions"] == [SPAN]
    for strategy, logprobs, labels in (("left", [-0.25, *[0.0] * 4], 63), ("right", [-0.5, -0.25, *[0.0] * 3], 62)):
        cutting: Any = Template(hub.DEMO, max_length=5, truncation_strategy=strategy)  # type: ignore[arg-type]
        (cut,) = cutting._invoke_post_pipeline([longer])
        assert cut["logprobs"].tolist() == logprobs and cut["labels"][0] == labels
        assert cut["weight_versions"][0]["end"] == (2 if strategy == "left" else 3)
    with pytest.raises(PromptError, match=r"the trajectory.logprobs has shape \(5,\)"):
        template._invoke_post_pipeline([{"input_ids": IDS, "logprobs": np.zeros(5)}])


def test_messages_that_are_encoded_anew_have_no_sampled_tokens(template: Template) -> None:
    """Their ids are other ones than those that were sampled."""
    feature = after(sampled({"messages": [USER]}, template, "2<|im_end|>"), USER)
    again = template.encode_trajectory(feature)
    assert "logprobs" not in again and "weight_versions" not in again and "logprobs" in feature
    assert not {"logprobs", "weight_versions"} & set(template.encode_trajectory(feature, True))


def test_appending_tokens_by_the_template_keeps_earlier_logprobs(template: Template) -> None:
    """Its own tokens have none, and no version: nobody says what sampled them."""
    feature = template.concat_input_feature(TURN, [65])
    assert feature["logprobs"] == [-0.5, -0.25, 0.0, 0.0, 0.0] and feature["weight_versions"] == [SPAN]
    assert "logprobs" not in template.concat_input_feature({"input_ids": IDS}, [65])


def test_samples_of_other_weights_are_equal_if_their_tokens_are() -> None:
    """What sampled them is not compared, as their seeds and engines are not. Features share nothing."""
    inputs = [TURN]
    made = response([columns(0, ["a"])], inputs, [IDS])
    other = response([columns(0, ["a"])], inputs, [IDS])
    other.columns.weight_versions[0] = (("other", 0),)
    assert made == other and made.sequences[0].new_input_feature != other.sequences[0].new_input_feature
    second = replace(made, turns=(Turn(weight_versions=(SPAN,)),))
    second.sequences[0].new_input_feature["weight_versions"][0]["weights"] = "changed"
    assert SPAN["weights"] == "initial"
