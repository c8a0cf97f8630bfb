"""Known defects of Twinkle's own samplers, one test each: none of them can happen here.

Defects in collecting results from workers (every result twice, a dict split, a small batch) are also tested for users'
classes, in tests/unit/test_remote_dispatch.py.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.lora import save_adapter
from twinkle_serve import SamplingParams, TorchSampler, hub, vLLMSampler
from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import AdapterError, PromptError, SamplingParamsError, TwinkleServeError
from twinkle_serve.sampler import RunningSampler, Sampler
from twinkle_serve.sampler.local import LocalClient

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(12, 24)]
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


def tokens(response: Any) -> list[list[int]]:
    return [sequence.tokens for sequence in response.sequences]


def test_an_unknown_adapter_is_refused(sampler: RunningSampler) -> None:
    """By name and by path; the base model never answers in its place."""
    with pytest.raises(AdapterError, match="unknown adapter 'nobody'"):
        sampler.sample(QUESTIONS, GREEDY, "nobody")
    with pytest.raises(AdapterError, match="no directory"):
        sampler.sample(QUESTIONS, GREEDY, adapter_path="/nowhere")


@pytest.mark.parametrize("engine", ["fake", "torch"])
def test_an_adapter_is_refused_if_lora_is_off(engine: str, tmp_path: Path) -> None:
    """When it is added by name, per call, or in a config."""
    args = {"model_id": "demo", "engine": engine, "engine_args": {"enable_lora": False}}
    sampler = RunningSampler(LocalClient(ServiceArgs.model_validate(args)))
    path = save_adapter(tmp_path / "lora")
    for call in (
        lambda: sampler.add_adapter_to_model("lora", path),
        lambda: sampler.sample(QUESTIONS, GREEDY, adapter_path=str(path)),
    ):
        with pytest.raises(AdapterError, match="LoRA is switched off"):
            call()
    assert len(tokens(sampler.sample(QUESTIONS, GREEDY))) == len(QUESTIONS)
    with pytest.raises(TwinkleServeError, match="LoRA is switched off"):
        ServiceArgs.model_validate({**args, "adapters": {"lora": str(path)}})
    sampler.shutdown()


def test_documented_samplers_and_calls_exist() -> None:
    """TorchSampler, and add_adapter_to_model on both."""
    for kind in (vLLMSampler, TorchSampler):
        assert issubclass(kind, Sampler)
        assert kind.add_adapter_to_model is not Sampler.add_adapter_to_model


def test_no_result_comes_twice(sampler: RunningSampler) -> None:
    """Exactly num_samples of each prompt, on any number of engines."""
    response = sampler.sample(QUESTIONS, GREEDY, num_samples=3)
    assert [seq.prompt_index for seq in response.sequences] == [i for i in range(len(QUESTIONS)) for _ in range(3)]
    assert response.columns.sample.tolist() == [0, 1, 2] * len(QUESTIONS)


def test_one_dict_is_one_prompt(sampler: RunningSampler) -> None:
    """Its messages are never split among engines."""
    dialogue = {
        "messages": [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": "1+1="},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "2+2="},
        ]
    }
    response = sampler.sample(dialogue, GREEDY)
    assert len(response.sequences) == 1
    assert tokens(response) == tokens(sampler.sample([dialogue], GREEDY))


def test_a_batch_smaller_than_the_engines_is_answered_and_an_empty_one_refused(sampler: RunningSampler) -> None:
    """One prompt works on two engines; no prompt is a PromptError at once."""
    assert len(tokens(sampler.sample(QUESTIONS[:1], GREEDY))) == 1
    with pytest.raises(PromptError, match="inputs is empty"):
        sampler.sample([], GREEDY)


def test_greedy_is_greedy(sampler: RunningSampler) -> None:
    """temperature=0 takes the likeliest token each time, and so does 0.0."""
    for temperature in (0, 0.0):
        params = SamplingParams(temperature=temperature, max_tokens=6, logprobs=1, ignore_eos=True)
        response = sampler.sample(QUESTIONS, params, num_samples=2)
        assert response.columns.logprob_tokens is not None
        assert (response.columns.logprob_tokens[:, 0] == response.columns.logprob_tokens[:, 1]).all()


def test_a_seed_is_honoured_on_any_layout(sampler: RunningSampler) -> None:
    """The same samples again, also in a smaller batch, which places them on other engines."""
    params = {"temperature": 1.5, "max_tokens": 8, "seed": 3, "ignore_eos": True}
    together = sampler.sample(QUESTIONS, params, num_samples=4)
    assert tokens(sampler.sample(QUESTIONS, params, num_samples=4)) == tokens(together)
    few = sampler.sample(QUESTIONS[:2], params, num_samples=4)
    assert tokens(few) == tokens(together)[:8]
    assert tokens(sampler.sample(QUESTIONS, {**params, "seed": 4}, num_samples=4)) != tokens(together)


def test_requests_do_not_queue_behind_one_another(sampler: RunningSampler) -> None:
    """On vllm a short call is answered while a long one runs; every engine answers all concurrent calls."""

    async def run() -> tuple[bool, int]:
        long = asyncio.create_task(
            sampler.sample_async(QUESTIONS, {"max_tokens": 230, "ignore_eos": True}, num_samples=4)
        )
        calls = [sampler.sample_async(question, {"max_tokens": 1}) for question in QUESTIONS]
        short = await asyncio.gather(*calls)
        overtaken = not long.done()
        return overtaken, len((await long).sequences) + len(short)

    overtaken, answered = asyncio.run(run())
    assert answered == 4 * len(QUESTIONS) + len(QUESTIONS)
    kind = next(iter(sampler.status()["engines"].values()))["engine"]
    assert overtaken or kind != "vllm"


def test_a_reader_that_leaves_does_not_block_the_sampler(sampler: RunningSampler) -> None:
    """Streams are closed midway, one after the other; later calls work."""
    for question in QUESTIONS:
        stream = sampler.sample_stream(question, {"max_tokens": 200, "ignore_eos": True})
        next(stream)
        del stream
    assert len(tokens(sampler.sample(QUESTIONS, GREEDY))) == len(QUESTIONS)


def test_a_stop_string_is_not_any_of_its_tokens(sampler: RunningSampler) -> None:
    """A string that does not occur stops nothing, even if its characters occur."""
    free = sampler.sample(QUESTIONS[0], {**GREEDY, "max_tokens": 8}).sequences[0]
    never = free.decoded[::-1] + free.decoded
    stopped = sampler.sample(QUESTIONS[0], {**GREEDY, "max_tokens": 8, "stop": [never]}).sequences[0]
    assert stopped.tokens == free.tokens


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "hot", True])
def test_an_invalid_temperature_is_refused(sampler: RunningSampler, value: Any) -> None:
    """With a typed error, before anything runs."""
    with pytest.raises(SamplingParamsError, match="temperature"):
        sampler.sample(QUESTIONS, {"temperature": value})


def test_an_unknown_parameter_is_named(sampler: RunningSampler) -> None:
    """With the parameter that was probably meant."""
    with pytest.raises(SamplingParamsError, match="'temprature', did you mean 'temperature'"):
        sampler.sample(QUESTIONS, {"temprature": 0.5})
    with pytest.raises(TypeError, match="best_of"):
        sampler.sample(QUESTIONS, best_of=3)  # type: ignore[call-arg]


def test_the_callers_dicts_stay_unchanged(sampler: RunningSampler) -> None:
    """Messages, tools and user data, at any depth; a returned feature shares nothing with them."""
    inputs: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": "12+34="}],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
            "user_data": {"id": [1, 2]},
        }
    ]
    before = copy.deepcopy(inputs)
    sequence = sampler.sample(inputs, GREEDY).sequences[0]
    inputs[0]["messages"].append({"role": "assistant", "content": "46"})  # must not change the earlier answer
    feature: Any = sequence.new_input_feature
    assert [message["role"] for message in feature["messages"]] == ["user", "assistant"]
    inputs[0]["messages"].pop()
    feature["messages"].append({"role": "user", "content": "more"})
    feature["user_data"]["id"].append(3)
    feature["tools"][0]["function"]["name"] = "other"
    assert inputs == before


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    """trust_remote_code is off: a model with its own code is refused, and the code does not run."""
    model = tmp_path / "model"
    shutil.copytree(hub.DEMO, model)
    proof = tmp_path / "it-ran"
    (model / "own.py").write_text(
        f"open({str(proof)!r}, 'w')\nfrom transformers import PretrainedConfig\n\n\nclass Own(PretrainedConfig): ...\n"
    )
    config = json.loads((model / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.Own"})
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(TwinkleServeError, match="trust_remote_code"):
        TorchSampler(model)
    assert not proof.exists()
