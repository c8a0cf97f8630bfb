"""Samplers of a user's own: subclasses of Sampler, as Twinkle's users write them."""

from __future__ import annotations

from typing import Any

import pytest

from twinkle_serve import SampledSequence, Sampler, SampleResponse, Template, hub
from twinkle_serve.errors import TemplateError, UnsupportedError

QUESTION: Any = {"messages": [{"role": "user", "content": "1+1="}]}


class Scripted(Sampler):
    """Answers what it was told to."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers = list(answers)

    def sample(self, inputs: Any, sampling_params: Any = None, adapter_name: str = "", **options: Any) -> Any:
        responses = []
        for item in self._normalize_inputs(inputs):
            feature: Any = self.encode_trajectory(item) if self._is_trajectory(item) else item
            assert self.template is not None
            tokens = self.template.tokenizer.encode(self.answers.pop(0))
            sequence = SampledSequence(
                stop_reason="stop",
                tokens=tokens,
                logprobs=[[(token, -0.5)] for token in tokens],
                decoded=self.decode_response(tokens),
                new_input_feature=self.template.concat_input_feature(feature, tokens),
            )
            responses.append(SampleResponse(sequences=[sequence], prompt_token_ids=list(feature["input_ids"])))
        return responses


def test_own_sampler_needs_only_sample() -> None:
    """Its template comes from the base class."""
    sampler = Scripted("2<|im_end|>", "3")
    assert sampler.template is None and sampler.device_mesh is None
    sampler.set_template("Template", model_id="demo")
    first, second = sampler.sample([QUESTION, QUESTION])
    assert first.sequences[0].decoded == "2<|im_end|>" and second.sequences[0].decoded == "3"
    assert first.sequences[0].new_input_feature["messages"][-1] == {"role": "assistant", "content": "2"}
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (Sampler,), {})()


def test_own_sampler_says_what_it_lacks() -> None:
    """A template, or adapters."""
    sampler = Scripted()
    for call in (lambda: sampler.encode_trajectory(QUESTION), lambda: sampler.decode_response([1])):
        with pytest.raises(TemplateError, match=r"Scripted has no template. Call set_template\(\) first"):
            call()
    with pytest.raises(TemplateError, match=r"set_template of Scripted needs model_id"):
        sampler.set_template("Template")
    with pytest.raises(UnsupportedError, match="Scripted has no adapters"):
        sampler.add_adapter_to_model("lora", "directory")


def test_own_sampler_takes_a_template_in_every_form() -> None:
    """An object, a class with its model, a name with the sampler's own model, or by assignment."""
    template = Template("demo")
    sampler: Any = Scripted()
    sampler.set_template(template)
    assert sampler.template is template
    sampler.set_template(Template, model_id=str(hub.DEMO), default_system="x")
    assert sampler.template.system == "x"
    sampler.model_id = "demo"
    sampler.set_template("Qwen3Template")
    assert sampler.template.system is None
    sampler.template = template
    assert sampler.template is template


def test_inputs_are_told_apart() -> None:
    """By the names that upstream's subclasses use."""
    sampler = Scripted()
    feature = {"input_ids": [1, 2]}
    assert Sampler._not_encoded(QUESTION) and not Sampler._not_encoded(feature) and Sampler._not_encoded({})
    assert not Sampler._not_encoded({"input_embedding": [[0.1]]})
    assert sampler._is_trajectory(QUESTION) and sampler._is_trajectory([QUESTION])
    assert not sampler._is_trajectory(feature) and not sampler._is_trajectory([feature])
    assert not sampler._is_trajectory([]) and not sampler._is_trajectory("text")
    assert sampler._normalize_inputs(feature) == [feature] == sampler._normalize_inputs([feature])
