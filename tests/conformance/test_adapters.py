"""LoRA adapters on every engine: the weights of the named version, or an error."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from tests.support.harness import EngineHarness, Prompts
from tests.support.lora import random_adapter, save_adapter
from twinkle_serve import hub
from twinkle_serve.adapters import CONFIG, read_adapter
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.engines import build_engine
from twinkle_serve.errors import AdapterError

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFiles]:
    """Three adapters, of ranks 4, 8 and 16."""
    directory = tmp_path_factory.mktemp("adapters")
    return [
        read_adapter(save_adapter(directory / str(seed), seed=seed, rank=rank))
        for seed, rank in ((1, 4), (2, 8), (3, 16))
    ]


async def test_engine_samples_from_the_named_adapter(
    engine: EngineHarness, prompts: Prompts, adapters: list[AdapterFiles]
) -> None:
    """Three adapters and the base model in one batch, more than there are slots; each samples as it does alone."""
    versions = [await engine.add(f"lora{i}", files) for i, files in enumerate(adapters)]
    everyone = [None, *versions]
    alone = [(await engine.sample(prompts, adapter=version, **GREEDY)).columns for version in everyone]
    parts = await asyncio.gather(*(engine.sample(prompts, adapter=version, **GREEDY) for version in everyone))
    for one, part in zip(alone, parts, strict=True):
        assert part.columns.tokens.tolist() == one.tokens.tolist()
        assert np.abs(part.columns.logprobs - one.logprobs).max() < 1e-4  # type: ignore[operator]
    assert len({tuple(columns.tokens.tolist()) for columns in alone}) == len(everyone), "an adapter changed nothing"
    assert [set(part.columns.adapter) for part in parts] == [{""}, {"lora0@1"}, {"lora1@1"}, {"lora2@1"}]
    for version in versions:
        await engine.server.drop_adapter(version)


async def test_engine_drops_an_adapter(engine: EngineHarness, prompts: Prompts, adapters: list[AdapterFiles]) -> None:
    """Afterwards a group that names it fails; the base model answers as before."""
    before = await engine.sample(prompts, **GREEDY)
    version = await engine.add("passing", adapters[0])
    await engine.server.drop_adapter(version)
    with pytest.raises(AdapterError, match="passing@1"):
        await engine.server._sample_group(engine.group(prompts[0], adapter=version))
    assert (await engine.sample(prompts, **GREEDY)).columns.tokens.tolist() == before.columns.tokens.tolist()


async def test_engine_scores_with_an_adapter(
    engine: EngineHarness, prompts: Prompts, adapters: list[AdapterFiles]
) -> None:
    """A sample re-scores to its own logprobs under its own adapter only."""
    version, other = await engine.add("scored", adapters[1]), await engine.add("other", adapters[2])
    sample = await engine.one(prompts[0], adapter=version, **GREEDY)
    whole = np.concatenate([prompts[0], sample.token_array])
    for adapter, same in ((version, True), (other, False), (None, False)):
        scored = await engine.sample([whole], max_tokens=0, prompt_logprobs=0, adapter=adapter)
        logprobs = scored.columns.scores[0].logprobs[len(prompts[0]) :]
        assert (np.abs(logprobs - sample.logprob_array).max() < 1e-3) == same  # type: ignore[operator]
    await engine.server.drop_adapter(version)
    await engine.server.drop_adapter(other)


async def test_engine_takes_a_new_version_under_an_old_name(
    engine: EngineHarness, prompts: Prompts, adapters: list[AdapterFiles]
) -> None:
    """No cache mixes the two: the prompt was sampled with the old version just before."""
    old = await engine.add("policy", adapters[0])
    first = await engine.sample(prompts, adapter=old, **GREEDY)
    new = await engine.add("policy", adapters[1])
    second = await engine.sample(prompts, adapter=new, **GREEDY)
    again = await engine.sample(prompts, adapter=old, **GREEDY)
    assert first.columns.tokens.tolist() == again.columns.tokens.tolist() != second.columns.tokens.tolist()
    await engine.server.drop_adapter(old)
    await engine.server.drop_adapter(new)


async def test_engine_refuses_an_adapter_of_another_model(
    engine: EngineHarness, prompts: Prompts, adapters: list[AdapterFiles]
) -> None:
    """Missing modules, all or one; other widths; too large a rank. Nothing is loaded, and the engine still works."""
    tensors = safetensors.numpy.load(adapters[0].weights)
    config = json.loads(adapters[0].config)

    def changed(rename: dict[str, str], **keys: object) -> AdapterFiles:
        renamed = {}
        for name, tensor in tensors.items():
            for old, new in rename.items():
                name = name.replace(old, new)
            renamed[name] = tensor
        return AdapterFiles(config=json.dumps({**config, **keys}).encode(), weights=safetensors.numpy.save(renamed))

    wide = {name: np.concatenate([t, t], 1) if "lora_A" in name else t for name, t in tensors.items()}
    refused = {
        "not in the model": changed({"model.layers": "transformer.h"}),
        "such as model.layers.9": changed({"model.layers.3": "model.layers.9"}),
        "another model": AdapterFiles(config=adapters[0].config, weights=safetensors.numpy.save(wide)),
    }
    before = await engine.sample(prompts, **GREEDY)
    for text, files in refused.items():
        with pytest.raises(AdapterError, match=text):
            await engine.add("stranger", files)
    version = await engine.add("welcome", adapters[0])
    with pytest.raises(AdapterError, match="rank 17, the engine takes 16"):
        await engine.server.load_adapter(type(version)(name="big", version=1, id=999_999, rank=17))
    after = await engine.sample(prompts, **GREEDY)
    assert after.columns.tokens.tolist() == before.columns.tokens.tolist()
    assert (await engine.one(prompts[0], adapter=version, **GREEDY)).adapter == "welcome@1"
    await engine.server.drop_adapter(version)


async def test_engine_refuses_an_adapter_that_its_dtype_cannot_hold(
    engine: EngineHarness, adapters: list[AdapterFiles]
) -> None:
    """By the dtypes that the engine says it has; the toy model has none."""
    fake = engine.info.kind == "fake"
    assert engine.info.dtype == engine.info.adapter_dtype == ("" if fake else "F32")
    assert (await engine.server.model_spec()).dtype == engine.info.dtype
    tensors = {name: t.astype(np.float64) for name, t in safetensors.numpy.load(adapters[0].weights).items()}
    next(iter(tensors.values()))[0, 0] = 1e39
    files = AdapterFiles(config=adapters[0].config, weights=safetensors.numpy.save(tensors))
    if fake:
        await engine.server.drop_adapter(await engine.add("huge", files))
        return
    with pytest.raises(AdapterError, match=r"in F32, up to .* would become infinite"):
        await engine.add("huge", files)


async def test_torch_holds_adapters_in_float32_whatever_its_model_has(adapters: list[AdapterFiles]) -> None:
    """peft's choice, on which the check of an adapter's values relies."""
    engine: Any = build_engine("torch", "half", str(hub.DEMO), {"dtype": "float16", "max_model_len": 64})
    await engine.start()
    await engine.load_adapter(AdapterVersion(name="half", version=1, id=1, rank=4), adapters[0])
    dtypes = {p.dtype for name, p in engine._model.causal_lm.named_parameters() if ".lora_" in name}
    assert (engine.info.dtype, engine.info.adapter_dtype, dtypes) == ("F16", "F32", {torch.float32})
    await engine.stop()


@pytest.mark.vllm
async def test_vllm_and_torch_agree_with_an_adapter(
    vllm_engine: EngineHarness, torch_engine: EngineHarness, prompts: Prompts, adapters: list[AdapterFiles]
) -> None:
    """In float32: the same greedy tokens, and logprobs that differ by less than 1e-3."""
    for files in adapters:
        one, other = [
            await engine.sample(prompts, adapter=await engine.add("same", files), **GREEDY)
            for engine in (vllm_engine, torch_engine)
        ]
        assert one.columns.tokens.tolist() == other.columns.tokens.tolist()
        assert np.abs(one.columns.logprobs - other.columns.logprobs).max() < 1e-3  # type: ignore[operator]
    await vllm_engine.server.keep_adapters([])
    await torch_engine.server.keep_adapters([])


def test_state_dict_of_several_adapters_is_refused() -> None:
    """One would be mistaken for the other."""
    from peft import LoraConfig, get_peft_model_state_dict

    from twinkle_serve.adapter_description import describe_adapter
    from twinkle_serve.adapters import pack_adapter

    model = random_adapter(seed=1)
    model.add_adapter("reference", LoraConfig(r=8, target_modules=["q_proj"]))
    config = model.peft_config["default"]
    with pytest.raises(AdapterError, match=r"of several adapters, one of them as .* adapter_name="):
        pack_adapter(config, model.state_dict())
    apart = {name: tensor for name, tensor in model.state_dict().items() if "q_proj" not in name or "reference" in name}
    with pytest.raises(AdapterError, match="of several adapters"):
        pack_adapter(config, apart)
    alone = pack_adapter(config, get_peft_model_state_dict(model, adapter_name="default"))
    assert describe_adapter(alone).rank == 8


def test_unsupported_adapter_is_refused(adapters: list[AdapterFiles], tmp_path: Path) -> None:
    """A directory without the files, other kinds of adapter, and options that an engine would ignore."""
    from twinkle_serve.adapter_description import describe_adapter

    config = json.loads(adapters[0].config)
    for key, value in (
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"target_modules_bd_a": []}),
        ("trainable_token_indices", [3]),
    ):
        with pytest.raises(AdapterError, match=key):
            files = AdapterFiles(config=json.dumps({**config, key: value}).encode(), weights=adapters[0].weights)
            describe_adapter(files)
    with pytest.raises(AdapterError, match="cut off or damaged"):
        describe_adapter(AdapterFiles(config=adapters[0].config, weights=adapters[0].weights[:-8]))
    with pytest.raises(AdapterError, match="no directory"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / CONFIG).write_bytes(adapters[0].config)
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path)
