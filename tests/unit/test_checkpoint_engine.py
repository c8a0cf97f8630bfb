"""CheckpointEngineManager: a torch or PEFT model of this process, and a sampler."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.lora import random_adapter
from tests.support.samplers import make_sampler
from twinkle_serve import hub
from twinkle_serve.checkpoint import ADDED_BY_WRAPPERS, named_tensors
from twinkle_serve.errors import AdapterError, RequestError, UnsupportedError
from twinkle_serve.peft_models import own_weights
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.upstream.checkpoint_engine import CheckpointEngineManager

QUESTION = [{"messages": [{"role": "user", "content": "12+34="}]}]
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def sampler() -> Iterator[RunningSampler]:
    sampler = make_sampler("torch")
    yield sampler
    sampler.shutdown()


def trained() -> Any:
    """A PEFT model with a trained adapter and a trained copy of a norm."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hub.DEMO, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], bias="none")
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return peft


def test_merged_weights_are_those_that_peft_merges() -> None:
    """Names are the checkpoint's, tensors trained beside LoRA are included, and the model is not changed."""
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mine = dict(own_weights(model, merged=True))
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    assert mine.keys() == expected.keys()
    assert all(torch.allclose(mine[name], tensor, atol=1e-6) for name, tensor in expected.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_update_merges_a_peft_model(sampler: RunningSampler) -> None:
    """Without a change to it; of anything else it says that there is nothing to merge."""
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampler.update_weights(model, "merged", merge_lora=True)
    merged = sampler.sample(QUESTION, GREEDY).sequences[0].logprobs
    sampler.update_weights(copy.deepcopy(model).merge_and_unload().state_dict(), "merged by peft")
    expected = sampler.sample(QUESTION, GREEDY).sequences[0].logprobs
    assert merged is not None and expected is not None
    assert [p[0][1] for p in merged] == pytest.approx([p[0][1] for p in expected], abs=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RequestError, match="merge_lora takes a model of peft, got dict"):
        sampler.update_weights(before, "nothing to merge", merge_lora=True)


@pytest.mark.parametrize(
    "wrapped",
    ["module.{}", "_orig_mod.{}", "_fsdp_wrapped_module.{}", "module._orig_mod.{}", "_checkpoint_wrapped_module.{}"],
)
def test_names_lose_what_wrappers_added(
    sampler: RunningSampler, wrapped: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start or within, and the log says so once."""
    weights = dict(named_tensors(hub.DEMO))
    own = {wrapped.format(name).replace(".layers.", ".layers._orig_mod."): value for name, value in weights.items()}
    with caplog.at_level(logging.INFO, logger="twinkle_serve.checkpoint"):
        label = sampler.update_weights(own, wrapped)
    assert sampler.status()["weights"] == label
    parts = [part for part in ADDED_BY_WRAPPERS if f".{part}" in f".{wrapped}" or part == "_orig_mod."]
    assert len(caplog.records) == len(parts)
    assert all(any(repr(part) in record.message for record in caplog.records) for part in parts)


def test_own_weights_are_those_without_adapters() -> None:
    """By the names of the checkpoint, as the model was loaded."""
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(hub.DEMO, dtype=torch.float32).state_dict()
    for model in (trained(), random_adapter()):
        mine = dict(own_weights(model, merged=False))
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name], tensor) for name, tensor in expected.items())


def test_adapter_that_is_merged_already_is_not_added_twice() -> None:
    """Trainers merge, sync and unmerge. Where the adapter does not belong to the weights that are sent, it is said."""
    model = trained()
    expected = {name: tensor.clone() for name, tensor in own_weights(model, merged=True)}
    model.merge_adapter()
    mine = dict(own_weights(model, merged=True))
    assert mine.keys() == expected.keys()
    assert all(torch.allclose(mine[name], tensor, atol=1e-6) for name, tensor in expected.items())
    with pytest.raises(UnsupportedError, match=r"the adapter default merged into them. Call model.unmerge_adapter\(\)"):
        list(own_weights(model, merged=False))
    model.unmerge_adapter()
    assert dict(own_weights(model, merged=False)).keys() == expected.keys()


@pytest.mark.parametrize(
    "special",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"alora_invocation_tokens": [1]},
        {"target_parameters": ["gate_up_proj"]},
        {"trainable_token_indices": [1]},
    ],
    ids=str,
)
def test_adapter_that_is_more_than_a_sum_of_weights_is_refused(special: dict[str, Any]) -> None:
    """Nothing of it is left out; the error names the key of its LoraConfig."""
    model = random_adapter()
    (key, value), *_ = special.items()
    setattr(model.peft_config["default"], key, value)
    with pytest.raises(UnsupportedError, match=rf"adapter 'default' is LORA with {key}=.*, which is not merged here"):
        list(own_weights(model, merged=True))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapter_of_tied_weights_is_not_merged(target: str) -> None:
    """It would change the embedding and the output layer. Untied, it is merged as peft merges it."""
    model = random_adapter(modules=("q_proj", target))
    with pytest.raises(
        AdapterError, match=rf"'default' has matrices for .*{target}, .* one weight for .* Train without"
    ):
        list(own_weights(model, merged=True))
    assert "lm_head.weight" in dict(own_weights(model, merged=False))
    base = model.get_base_model()
    layer = base.lm_head.base_layer if target == "lm_head" else base.lm_head
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    merged = dict(own_weights(model, merged=True))
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_synced_adapter_samples_calls_that_name_none(sampler: RunningSampler) -> None:
    """The first call sends the model's own weights; each later one a version of the adapter, which samples name."""
    model = random_adapter(scale=0.6)
    manager = CheckpointEngineManager(model=model, sampler=sampler, platform="GPU")
    plain = sampler.sample(QUESTION, GREEDY)
    manager.sync_weights(merge_and_sync=False)
    first = sampler.sample(QUESTION, GREEDY).sequences[0]
    assert first.adapter == "" and first.tokens == plain.sequences[0].tokens
    assert first.weight_versions[0].version.startswith("sync-")
    for number in (1, 2):
        manager.sync_weights(merge_and_sync=False)
        assert sampler.sample(QUESTION, GREEDY).sequences[0].adapter == f"synced@{number}"
    adapted = sampler.sample(QUESTION, GREEDY).sequences[0].tokens
    assert adapted != first.tokens
    assert sampler.sample(QUESTION, GREEDY, use_base_model=True).sequences[0].tokens == first.tokens
    manager.sync_weights()
    merged = sampler.sample(QUESTION, GREEDY).sequences[0]
    assert merged.adapter == "" and merged.tokens == adapted, "the merged weights, without the adapter"
    sampler.remove_adapter("synced")


def test_models_and_samplers_of_other_kinds_are_refused_with_the_calls_to_make(sampler: RunningSampler) -> None:
    """A model in Twinkle's actors, a sampler of one's own, adapters that are not plain LoRA."""
    with pytest.raises(UnsupportedError, match=r"takes a torch module, got object. .*sampler.update_weights\("):
        CheckpointEngineManager(model=object(), sampler=sampler)
    model = random_adapter()
    with pytest.raises(UnsupportedError, match="takes vLLMSampler, TorchSampler or connect"):
        CheckpointEngineManager(model=model, sampler=object())
    model.peft_config["default"].use_dora = True
    with pytest.raises(
        UnsupportedError, match="adapter 'default' is LORA with use_dora=True, which is not merged here"
    ):
        CheckpointEngineManager(model, sampler).sync_weights()
