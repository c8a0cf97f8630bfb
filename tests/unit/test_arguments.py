"""Arguments of a wrong type, in every public call of a sampler: a typed error, never one of Python's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.samplers import FakeSampler
from twinkle_serve import SampledSequence, SampleResponse
from twinkle_serve.errors import AdapterError, PromptError, RequestError, TwinkleServeError
from twinkle_serve.sampler import RunningSampler

QUESTION = {"messages": [{"role": "user", "content": "12+34="}]}
SHORT = {"max_tokens": 2}
WRONG: list[Any] = [2.5, b"x", {"a": 1}, object(), [None], float("nan"), -1, 10**30, np.array([1.5]), len]


@pytest.fixture(scope="module")
def sampler() -> Iterator[RunningSampler]:
    made = FakeSampler("demo")
    yield made
    made.shutdown()


def cancelled(sampler: RunningSampler, indices: Any) -> int:
    with sampler.sample_iter([QUESTION] * 4, {"max_tokens": 900, "ignore_eos": True}) as rollouts:
        return rollouts.cancel(indices)


CALLS: dict[str, Callable[[Any, Any], object]] = {
    "inputs": lambda s, w: s.sample(w, SHORT),
    "sampling_params": lambda s, w: s.sample(QUESTION, {"top_p": w}),
    "adapter_name": lambda s, w: s.sample(QUESTION, SHORT, w),
    "adapter_path": lambda s, w: s.sample(QUESTION, SHORT, adapter_path=w),
    "stream's adapter_path": lambda s, w: list(s.sample_stream(QUESTION, SHORT, adapter_path=w)),
    "num_samples": lambda s, w: s.sample(QUESTION, SHORT, num_samples=w),
    "use_base_model": lambda s, w: s.sample(QUESTION, SHORT, use_base_model=w),
    "score's use_base_model": lambda s, w: s.score(QUESTION, use_base_model=w),
    "top_logprobs": lambda s, w: s.score(QUESTION, top_logprobs=w),
    "min_groups": lambda s, w: s.sample(QUESTION, SHORT, min_groups=w),
    "progress": lambda s, w: s.sample_iter(QUESTION, SHORT, progress=w),
    "sample's progress": lambda s, w: s.sample(QUESTION, SHORT, progress=w),
    "cancel": lambda s, w: cancelled(s, w),
    "response": lambda s, w: s.verify(w, against=s),
    "against": lambda s, w: s.verify(s.sample(QUESTION, SHORT), against=w),
    "verify's adapter_name": lambda s, w: s.verify(s.sample(QUESTION, SHORT), against=s, adapter_name=w),
    "adapter's name": lambda s, w: s.add_adapter_to_model(w, "/nowhere"),
    "adapter's directory": lambda s, w: s.add_adapter_to_model("lora", w),
    "removed adapter": lambda s, w: s.remove_adapter(w),
    "template": lambda s, w: s.set_template(w),
    "weights": lambda s, w: s.update_weights(w, "one"),
    "mode": lambda s, w: s.update_weights({}, "two", w),
    "allow_nonfinite": lambda s, w: s.update_weights({}, "three", allow_nonfinite=w),
    "pause": lambda s, w: s.pause(w),
    "level": lambda s, w: s.sleep(w),
    "tags": lambda s, w: s.wake_up(w),
    "engine": lambda s, w: s.drain_engine(w),
    "engine_args": lambda s, w: FakeSampler("demo", w),
    "device_mesh": lambda s, w: FakeSampler("demo", device_mesh=w),
    "remote_group": lambda s, w: FakeSampler("demo", remote_group=w),
    "replace": lambda s, w: FakeSampler("demo", remote_group="sampler", replace=w),
    "force": lambda s, w: s.shutdown(force=w),
}


@pytest.mark.parametrize("argument", CALLS)
def test_argument_of_a_wrong_type_is_a_typed_error(sampler: RunningSampler, argument: str) -> None:
    """And the next call works."""
    for wrong in WRONG:
        with pytest.raises(TwinkleServeError):
            CALLS[argument](sampler, wrong)
    assert len(sampler.sample(QUESTION, SHORT).sequences) == 1


@pytest.mark.parametrize("wrong", [0, False, [], {}, b"", np.zeros(2)], ids=repr)
def test_adapter_name_that_is_false_but_no_text_is_refused(sampler: RunningSampler, wrong: Any) -> None:
    """Not taken for the base model, or for the default adapter. None is none, as of adapter_path."""
    with pytest.raises(AdapterError, match="adapter_name must be a string"):
        sampler.sample(QUESTION, SHORT, wrong)
    none: Any = None
    assert sampler.sample(QUESTION, SHORT, none).sequences[0].adapter == ""


def test_verifying_a_response_made_by_hand_is_refused(sampler: RunningSampler) -> None:
    """By that name: no engine has sampled it."""
    made = SampleResponse([SampledSequence("stop", [5], [[(5, -1.0)]])], [1, 2])
    with pytest.raises(RequestError, match="made by hand"):
        sampler.verify(made, against=sampler)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (2, "prompt_indices must be a list of indices, got 2. For one prompt, give a list of one"),
        ("12", "prompt_indices must be a list of indices, got '12'"),
        ([4], "prompt_indices must be between 0 and 3, got 4"),
        ([0, -1], "prompt_indices must be between 0 and 3, got -1"),
        ([True], "prompt_indices must be a whole number, got True"),
    ],
)
def test_cancelling_prompts_that_the_call_does_not_have_is_refused(
    sampler: RunningSampler, indices: Any, message: str
) -> None:
    """By name and with the bounds: the prompt that was meant would go on."""
    with pytest.raises(RequestError) as caught:
        cancelled(sampler, indices)
    assert message in str(caught.value)
    assert cancelled(sampler, np.array([0, 3])) == 2


@pytest.mark.parametrize(
    "arguments",
    [{1: "a", "b": 2}, {"a": {None: 1, "b": 2}}, {"a": [{"b": 1, 2.5: 3}]}, {True: 1}, {(1, 2): 3}],
    ids=str,
)
def test_arguments_of_a_tool_call_with_keys_that_json_does_not_have_are_refused(
    sampler: RunningSampler, arguments: dict[Any, Any]
) -> None:
    """A template would write others in their place; the error names the key."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages = [*turns, {"role": "tool", "content": "2"}]
    with pytest.raises(
        PromptError, match=r"its arguments have the key (1|None|2.5|True|\(1, 2\)), and JSON's keys are strings"
    ):
        sampler.sample({"messages": messages}, SHORT)


def test_errors_of_an_adapter_from_memory_name_what_was_given(sampler: RunningSampler) -> None:
    """The LoraConfig and the state_dict, not files that nobody has written."""
    from peft import LoraConfig

    halves = {"lora_A": np.ones((4, 64), np.float32), "lora_B": np.ones((64, 4), np.float32)}
    tensors = {f"model.layers.0.self_attn.q_proj.{half}.weight": torch_of(value) for half, value in halves.items()}
    broken = {**tensors, next(iter(tensors)): torch_of(np.full((4, 64), np.nan, np.float32))}
    for config, state_dict, message in (
        (LoraConfig(r=8, target_modules=["q_proj"]), tensors, "has rank 4, the LoraConfig says r=8"),
        (LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), tensors, "the LoraConfig: use_dora=True"),
        (LoraConfig(r=4, target_modules=["q_proj"]), broken, "the state_dict: .* values of 256 that are not finite"),
    ):
        with pytest.raises(AdapterError, match=message) as caught:
            sampler.add_adapter_to_model("lora", config, state_dict=state_dict)
        assert "adapter_config.json" not in str(caught.value) and "safetensors" not in str(caught.value)


def torch_of(array: Any) -> Any:
    import torch

    return torch.from_numpy(array)
