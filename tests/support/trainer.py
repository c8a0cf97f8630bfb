"""A trainer's process in an environment that has only the client: `python trainer.py APPLICATION [--torch]`.

It calls a running service and prints the results as one line of JSON. Its model and adapter are numpy arrays, or with
`--torch` a transformers model and a peft adapter, of the versions installed there.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import twinkle_serve
from twinkle_serve import SamplingParams, connect
from twinkle_serve.errors import AdapterError, ConfigError
from twinkle_serve.sampler import RunningSampler

MODEL = Path(twinkle_serve.__file__).parent / "demo"
QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in (12, 34)]
PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
MODULE = "model.layers.0.self_attn.q_proj"
NOT_OF_THE_CLIENT = ("torch", "transformers", "peft", "modelscope", "huggingface_hub", "vllm", "fsspec", "blake3")


class LoraConfig:
    """Stand-in for peft's LoraConfig, for a trainer without peft."""

    peft_type = "LORA"

    def to_dict(self) -> dict[str, Any]:
        return {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": [MODULE], "bias": "none"}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, and an adapter of the model before training."""

    before: Mapping[str, Any]
    """Weights before training."""
    weights: Mapping[str, Any]
    config: Any
    adapter: Mapping[str, Any]
    """Tensors of the adapter."""
    logprobs: dict[str, list[float]]
    """Of `ids` under the trainer's own model, in nats, by "weights" and "adapter". Empty without torch."""


def train_arrays(ids: Sequence[int]) -> Trained:
    """A model and an adapter of numpy arrays."""
    from safetensors.numpy import load_file

    before = load_file(MODEL / "model.safetensors")
    rng = np.random.default_rng(1)
    outputs, inputs = before[f"{MODULE}.weight"].shape
    adapter = {
        f"{MODULE}.lora_A.weight": rng.normal(size=(2, inputs)).astype(np.float32),
        f"{MODULE}.lora_B.weight": rng.normal(size=(outputs, 2)).astype(np.float32),
    }
    trained = {name: array * np.float32(0.9) for name, array in before.items()}
    return Trained(before=before, weights=trained, config=LoraConfig(), adapter=adapter, logprobs={})


def train_tensors(ids: Sequence[int]) -> Trained:
    """A transformers model and a peft adapter."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    def logprobs(model: Any) -> list[float]:
        tokens = torch.tensor([list(ids)])
        with torch.no_grad():
            scores = model(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])
        return [float(score) for score in scores.flatten()]

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
        said["weights"] = logprobs(model)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(before)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
        peft = get_peft_model(model, config)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    said["adapter"] = logprobs(peft)
    adapter = get_peft_model_state_dict(peft)
    return Trained(before=before, weights=weights, config=config, adapter=adapter, logprobs=said)


def run(sampler: RunningSampler, with_torch: bool) -> dict[str, Any]:
    """Makes the calls of a trainer and returns their results."""
    name = "torch" if with_torch else "numpy"
    response = sampler.sample(QUESTIONS, PARAMS, num_samples=2)
    ids = response.sequences[0].new_input_feature["input_ids"]

    def score(adapter_name: str = "") -> list[float]:
        scores = sampler.score({"input_ids": ids}, adapter_name).prompt_logprobs
        assert scores is not None
        return [float(score) for score in scores[1:] if score is not None]

    trained = train_tensors(ids) if with_torch else train_arrays(ids)
    logprobs = {"before": score()}
    versions = [sampler.update_weights(trained.weights, f"{name}-1")]
    logprobs["weights"] = score()
    sampled = sampler.sample(QUESTIONS, PARAMS)
    versions.append(sampler.update_weights(trained.before, f"{name}-2"))
    logprobs["after"] = score()
    adapter = sampler.add_adapter_to_model(name, trained.config, state_dict=trained.adapter)
    logprobs["adapter"] = score(name)
    adapted = sampler.sample(QUESTIONS, PARAMS, name)
    with sampler.pause():
        engines = sampler.status()["engines"]
    return {
        "logprobs": logprobs,
        "own_logprobs": trained.logprobs,
        "versions": versions,
        "sampled_by": sorted({span.version for sequence in sampled.sequences for span in sequence.weight_versions}),
        "adapter": adapter,
        "adapters_of_samples": sorted({sequence.adapter for sequence in adapted.sequences}),
        "samples": len(response.sequences),
        "prompts": sorted(part.prompt_index for part in sampler.sample_iter(QUESTIONS, PARAMS)),
        "prompts_async": len(asyncio.run(sampler.sample_async(QUESTIONS, PARAMS))),
        "engines": len(engines),
    }


def errors(sampler: RunningSampler) -> list[str]:
    """Names of the errors that wrong calls raise here."""
    raised = []
    for call in (
        lambda: sampler.sample(QUESTIONS, PARAMS, "no-such-adapter"),
        lambda: twinkle_serve.TorchSampler("demo"),
    ):
        try:
            call()
        except (AdapterError, ConfigError) as error:
            raised.append(type(error).__name__)
    return raised


def main() -> None:
    sampler = connect(sys.argv[1], timeout_s=60)
    with_torch = "--torch" in sys.argv
    facts = run(sampler, with_torch)
    facts["errors"] = errors(sampler)
    facts["imported"] = sorted(set(NOT_OF_THE_CLIENT) & set(sys.modules))
    facts["package"] = str(MODEL)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
