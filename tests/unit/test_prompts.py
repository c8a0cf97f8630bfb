"""Inputs of a call: valid ones, and refused ones with the reason."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from twinkle_serve import hub
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.groups import EngineInfo
from twinkle_serve.engines.param_checks import check_fits, check_params
from twinkle_serve.errors import PromptError, SamplingParamsError
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import encode_inputs

TRAJECTORY = {"messages": [{"role": "user", "content": "12+34="}], "user_data": {"id": 1}}


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(hub.DEMO)


def test_trajectory_is_rendered_up_to_the_assistants_turn(template: Template) -> None:
    """By the model's own chat template; the input is unchanged."""
    before = copy.deepcopy(TRAJECTORY)
    (prompt,) = encode_inputs(TRAJECTORY, template)
    text = template.decode(prompt.ids)
    assert text == "<|im_start|>user\n12+34=<|im_end|>\n<|im_start|>assistant\n"
    assert before == TRAJECTORY


@pytest.mark.parametrize("ids", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint8)])
def test_input_feature_takes_lists_and_arrays(ids: Any, template: Template) -> None:
    """They give the same prompt."""
    (prompt,) = encode_inputs([{"input_ids": ids, "labels": [-100] * 3}], template)
    assert prompt.ids.tolist() == [1, 2, 3] and prompt.ids.dtype == np.int32


def test_input_feature_takes_torch_tensors(template: Template) -> None:
    """One-dimensional ones."""
    import torch

    (prompt,) = encode_inputs([{"input_ids": torch.tensor([4, 5]), "attention_mask": torch.ones(2)}], template)
    assert prompt.ids.tolist() == [4, 5]


def test_tools_reach_the_template(template: Template) -> None:
    """They change the prompt."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    with_tools, without = (
        encode_inputs([item], template)[0].ids for item in ({**TRAJECTORY, "tools": tools}, TRAJECTORY)
    )
    assert len(with_tools) > len(without)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "inputs is empty"),
        ("12+34=", "must be a Trajectory or an InputFeature"),
        (None, "got NoneType"),
        ([TRAJECTORY, {"input_ids": [1]}], r"inputs[0] is a Trajectory (messages), inputs[1] is an InputFeature"),
        ([{"input_ids": [1]}, [1, 2]], "inputs[1] is list"),
        ([{"mesages": []}], "did you mean 'messages'"),
        ([{}], "inputs[0] has neither messages nor input_ids"),
        ([{"messages": []}], "must be a list of at least one message"),
        ([{"messages": "hello"}], "must be a list of at least one message, got 'hello'"),
        ([{"messages": [{"content": "x"}]}], "messages[0] must be a dict with a role"),
        ([{"messages": [{"role": "user"}]}], "messages[0].content of a message with role 'user' must be text"),
        ([{**TRAJECTORY, "userdata": 1}], "unknown key of a Trajectory 'userdata', did you mean 'user_data'"),
        ([{**TRAJECTORY, "images": ["x.png"]}], "inputs[0].images: this service samples from text only"),
        ([{"input_ids": [1], "pixel_values": np.ones(3)}], "pixel_values: this service samples from text only"),
        ([{"input_ids": [[1, 2]]}], "must have one dimension, got shape (1, 2)"),
        ([{"input_ids": [1.5]}], "must be whole numbers, got float64"),
        ([{"input_ids": [True]}], "must be whole numbers, got bool"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 1]}], "hides 1 of 2 tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "attention_mask has shape (1,), input_ids (2,)"),
        ([{"input_ids": [1], "attention_mask": [[1], [1, 1]]}], "attention_mask is not an array of numbers"),
        ([{"input_ids": [[1, 2], [3]]}], "input_ids is not an array of numbers"),
        ([{**TRAJECTORY, "images": 5}], "images: this service samples from text only"),
        ([{"input_ids": [-1]}], "contains -1, which is not a token id"),
        ([{"input_ids": [2**40]}], f"contains {2**40}, which is not a token id"),
    ],
)
def test_invalid_input_is_refused(inputs: Any, message: str, template: Template) -> None:
    """The message has its position, its value and the remedy."""
    with pytest.raises(PromptError) as caught:
        encode_inputs(inputs, template)
    assert message in str(caught.value)


INFO = EngineInfo(
    name="e",
    kind="fake",
    max_model_len=10,
    vocab_size=320,
    max_num_seqs=4,
    max_logprobs=5,
    scores_full_context=True,
    logprobs_mode="raw_logprobs",
    device="cpu",
    cpus=(),
    eos_token_ids=(2,),
    lacks={"thinking_token_budget": "it never thinks."},
)


class Bytes:
    """A tokenizer with a token for each byte."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [*text.encode()]


@pytest.mark.parametrize(
    ("ids", "params", "error", "message"),
    [
        ([], {}, PromptError, "inputs[0] is empty"),
        ([1] * 10, {}, PromptError, "inputs[0] has 10 tokens, the context holds 10, one of them for a sampled token"),
        ([1] * 11, {"max_tokens": 0}, PromptError, "has 11 tokens, the context holds 10. Shorten it"),
        ([320], {}, PromptError, "holds token id 320, the model's vocabulary is 0 to 319"),
        ([1], {"stop": [5, 320]}, SamplingParamsError, "stop holds token id 320, the model's vocabulary is 0 to 319"),
        ([1], {"stop_token_ids": [320]}, SamplingParamsError, "stop_token_ids holds token id 320, the model's"),
        (
            [1],
            {"allowed_token_ids": [1, 320]},
            SamplingParamsError,
            "allowed_token_ids holds token id 320, the model's",
        ),
        ([1], {"logprob_token_ids": [320]}, SamplingParamsError, "logprob_token_ids holds token id 320, the model's"),
        ([1], {"logit_bias": {320: 1}}, SamplingParamsError, "logit_bias holds token id 320, the model's"),
        ([1] * 5, {"min_tokens": 6}, SamplingParamsError, "min_tokens=6 does not fit: inputs[0] has 5 tokens"),
        (
            [1] * 5,
            {"prompt_logprobs": 0, "prompt_logprobs_start": 5},
            SamplingParamsError,
            "prompt_logprobs_start=5, but inputs[0] has 5 tokens",
        ),
        ([1], {"min_tokens": 1, "allowed_token_ids": [2]}, SamplingParamsError, "min_tokens may exclude all of them"),
        (
            [1],
            {"min_tokens": 1, "allowed_token_ids": [2, 7], "stop_token_ids": [7]},
            SamplingParamsError,
            "allowed_token_ids has 2 tokens, and min_tokens may exclude all of them",
        ),
        (
            [1],
            {"bad_words": ["a"], "allowed_token_ids": [97]},
            SamplingParamsError,
            "bad_words may exclude all of them",
        ),
        ([1], {"thinking_token_budget": 0}, SamplingParamsError, "thinking_token_budget is not available: it never"),
        ([1], {"logprobs": 6}, SamplingParamsError, "logprobs=6, the engine returns at most 5"),
        ([1], {"prompt_logprobs": 6}, SamplingParamsError, "prompt_logprobs=6, the engine returns at most 5"),
    ],
)
def test_prompt_that_the_engine_does_not_support_is_refused(
    ids: list[int], params: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Before it is sent; the message has both numbers."""
    with pytest.raises(error) as caught:
        check_params(INFO, SamplingParams(**params), Bytes())
        check_fits(INFO, np.array(ids, np.int32), SamplingParams(**params), "inputs[0]")
    assert message in str(caught.value)


def test_prompt_that_fills_the_context_can_be_scored_if_the_engine_supports_it() -> None:
    """With max_tokens=0 torch needs no room for a sampled token; vLLM does. 9 of 10 leave room for one."""
    check_fits(INFO, np.ones(10, np.int32), SamplingParams(max_tokens=0))
    check_fits(INFO, np.ones(9, np.int32), SamplingParams())
    with pytest.raises(PromptError, match="10 tokens, the context holds 10, one of them for a sampled token"):
        check_fits(replace(INFO, scores_full_context=False), np.ones(10, np.int32), SamplingParams(max_tokens=0))
