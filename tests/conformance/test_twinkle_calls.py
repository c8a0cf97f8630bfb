"""Calls of Twinkle's samplers and rollouts, on every sampler."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.lora import save_adapter
from twinkle_serve import SampleResponse, SamplingParams, Template, conventions
from twinkle_serve.errors import AdapterError, UnsupportedError
from twinkle_serve.sampler import RunningSampler

QUESTIONS: list[Any] = [
    {"messages": [{"role": "user", "content": f"{a}+{a}="}], "user_data": [("id", str(a))]} for a in (12, 345)
]
GREEDY = {"temperature": 0, "max_tokens": 8}
_names = (f"default{i}" for i in itertools.count())


@pytest.fixture
def adapter(sampler: RunningSampler, tmp_path: Path) -> Iterator[str]:
    """Name of an adapter that the sampler has loaded."""
    name = next(_names)
    sampler.add_adapter_to_model(name, save_adapter(tmp_path / "lora", seed=3, scale=0.6))
    yield name
    sampler.default_adapter = ""
    sampler.remove_adapter(name)


@pytest.fixture
def twinkles() -> Iterator[None]:
    conventions.follow_twinkle()
    yield
    conventions.follow_twinkle(False)


def test_default_adapter_samples_every_call_that_names_none(sampler: RunningSampler, adapter: str) -> None:
    """Each sample says so. A call can still name the base model; an adapter that is gone fails the call."""
    named = sampler.sample(QUESTIONS, GREEDY, adapter)
    base = sampler.sample(QUESTIONS, GREEDY)
    sampler.default_adapter = adapter
    for response in (sampler.sample(QUESTIONS, GREEDY), *sampler.sample_iter(QUESTIONS, GREEDY)):
        assert {sequence.adapter for sequence in response.sequences} == {f"{adapter}@1"}
    assert sampler.sample(QUESTIONS, GREEDY) == named
    assert sampler.sample(QUESTIONS, GREEDY, use_base_model=True) == base
    text = "".join(delta for delta, _ in sampler.sample_stream(QUESTIONS[0], GREEDY))
    assert text == named.sequences[0].decoded
    ids = [{"input_ids": named[0].prompt_token_ids}]
    assert sampler.score(ids).prompt_logprobs == sampler.score(ids, adapter).prompt_logprobs
    engines = sampler.status()["engines"].values()
    if all(engine["engine"] != "fake" for engine in engines):
        assert sampler.verify(base, against=sampler).max_abs_difference < 1e-2, "of the base model, not the default"
    sampler.default_adapter = "gone"
    with pytest.raises(AdapterError, match="gone"):
        sampler.sample(QUESTIONS, GREEDY)
    with pytest.raises(AdapterError, match="default_adapter must be the name of an adapter, got 3"):
        sampler.default_adapter = 3  # type: ignore[assignment]


def test_stream_leaves_special_tokens_out_if_it_is_told_to(sampler: RunningSampler) -> None:
    """The rest of the text is the same, and it ends for the same reason."""
    whole = list(sampler.sample_stream(QUESTIONS[0], GREEDY))
    plain = list(sampler.sample_stream(QUESTIONS[0], GREEDY, skip_special_tokens=True))
    template = sampler.template
    text = "".join(delta for delta, _ in whole)
    ids = template.tokenizer.encode(text, add_special_tokens=False)
    assert "".join(delta for delta, _ in plain) == template.decode(ids, skip_special_tokens=True)
    assert plain[-1][1] == whole[-1][1]


def test_sampler_is_twinkles_where_defaults_are_twinkles(sampler: RunningSampler, twinkles: None) -> None:
    """A list of responses, one entry a token for logprobs=1, and streams without special tokens."""
    responses = sampler.sample(QUESTIONS, {**GREEDY, "logprobs": 1})
    assert isinstance(responses, list) and len(responses) == 2
    assert all(isinstance(response, SampleResponse) for response in responses)
    assert [[entry[0][0] for entry in seq.logprobs or []] for seq in responses.sequences] == [
        seq.tokens for seq in responses.sequences
    ]
    assert {len(entry) for seq in responses.sequences for entry in seq.logprobs or []} == {1}
    text = "".join(delta for delta, _ in sampler.sample_stream(QUESTIONS[0], GREEDY))
    assert not any(token in text for token in sampler.template.special_tokens)


def test_sampler_encodes_and_decodes_with_its_template(sampler: RunningSampler) -> None:
    """The feature of a trajectory is sampled as the trajectory itself is."""
    response = sampler.sample(QUESTIONS[0], GREEDY)
    feature = sampler.encode_trajectory(QUESTIONS[0])
    assert list(feature["input_ids"]) == response.prompt_token_ids and "labels" not in feature
    assert feature["messages"] == QUESTIONS[0]["messages"] and feature["user_data"] == [("id", "12")]
    again = sampler.sample(feature, GREEDY).sequences[0]
    assert again.tokens == response.sequences[0].tokens
    assert again.new_input_feature["messages"] == response.sequences[0].new_input_feature["messages"]
    assert sampler.decode_response(again.tokens) == again.decoded
    assert sampler.template is sampler.template
    sampler.set_template("Template", system="Add.")
    try:
        assert sampler.template.system == "Add."
        ids = sampler.sample(QUESTIONS[0], GREEDY).prompt_token_ids
        assert list(sampler.encode_trajectory(QUESTIONS[0])["input_ids"]) == ids
    finally:
        sampler.template = Template("demo")


def test_calls_of_twinkles_checkpoint_engine_say_what_to_call(sampler: RunningSampler) -> None:
    """Those that make no difference here do nothing."""
    for call in (sampler.receive_weights, sampler.prepare_checkpoint_engine, sampler.finalize_checkpoint_engine):
        with pytest.raises(UnsupportedError, match=r"Call update_weights\("):
            call()
    with pytest.raises(UnsupportedError, match="add_adapter_to_model"):
        sampler.add_adapter_to_sampler("lora", object())
    sampler.reset_mm_cache()
    sampler.reset_encoder_cache()


def test_multi_turn_rollout_of_upstreams_kind_keeps_tokens_and_logprobs_aligned(
    sampler: RunningSampler, twinkles: None
) -> None:
    """Encode, sample in one batch, parse tool calls, append the tools' turn as text between two renderings, again.

    Every sampled token keeps its label and its logprob, and the turns in between have none.
    """
    template = Template("demo")
    features: list[dict[str, Any]] = [template.encode(question, add_generation_prompt=True) for question in QUESTIONS]
    params = SamplingParams(max_tokens=12, logprobs=1, temperature=0)
    logprobs: list[list[Any]] = [[] for _ in features]
    live = list(range(len(features)))
    while live:
        width = sampler.device_mesh.data_world_size if sampler.device_mesh is not None else 1
        batch = [features[i] for i in live]
        batch += batch[-1:] * (width - len(batch))
        responses = sampler.sample(batch, sampling_params=params)
        assert isinstance(responses, list) and len(responses) == len(batch)
        for i, response in zip(list(live), responses, strict=False):
            sample = response.sequences[0]
            assert sample.logprobs is not None and len(sample.logprobs) == len(sample.tokens)
            assert template.parse_tool_call(sample.decoded) == []
            logprobs[i] += sample.logprobs
            features[i] = dict(sample.new_input_feature)
            if sample.stop_reason == "length" or len(features[i]["messages"]) > 4:
                live.remove(i)
            else:
                features[i] = with_tool_answer(features[i], template)
    for question, feature, known in zip(QUESTIONS, features, logprobs, strict=True):
        labels = list(feature["labels"])
        trained = [label for label in labels if label != -100]
        assert trained == [token for entry in known for token, _ in entry]
        roles = [message["role"] for message in feature["messages"]]
        assert roles == ["user", *["assistant", "tool"] * 3][: len(roles)] and roles[-1] == "assistant"
        assert feature["user_data"] == question["user_data"] and feature["length"] == len(labels)


def with_tool_answer(feature: dict[str, Any], template: Template) -> dict[str, Any]:
    """Appends a tool's answer and the beginning of the next turn, as rollouts for Twinkle do."""
    messages = [*feature["messages"], {"role": "tool", "content": "4"}]
    render = template.tokenizer.apply_chat_template
    before = render(feature["messages"], tokenize=False, add_generation_prompt=False)
    after = render(messages, tokenize=False, add_generation_prompt=True)
    assert after.startswith(before)
    ids = template.tokenizer.encode(after[len(before) :], add_special_tokens=False)
    labels = [*feature["labels"][-1:], *feature["labels"][:-1], *[-100] * len(ids)]
    longer = {**feature, "input_ids": [*feature["input_ids"], *ids], "labels": labels}
    (finished,) = template._invoke_post_pipeline([longer])
    lists = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in finished.items()}
    return {**lists, "messages": messages}
