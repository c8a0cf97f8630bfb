"""An adapter against its model: complete, and nothing trained beside it that would be lost."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from tests.support.lora import LINEAR, random_adapter
from twinkle_serve import hub
from twinkle_serve.adapter_description import describe_adapter
from twinkle_serve.adapters import pack_adapter, read_adapter
from twinkle_serve.checkpoint import read_model_spec
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.engines.adapter_checks import AdapterChecks
from twinkle_serve.engines.fake import FakeEngine
from twinkle_serve.errors import AdapterError

MODEL = read_model_spec(hub.DEMO)
CHECKS = AdapterChecks(hub.DEMO)
TENSORS: dict[str, torch.Tensor] = get_peft_model_state_dict(random_adapter(seed=1))
"""Of an adapter of all linear layers, of rank 8."""


def check(config: Any, tensors: dict[str, Any]) -> None:
    CHECKS.check(describe_adapter(pack_adapter(config, tensors)), MODEL)


def adapted(**options: Any) -> Any:
    """A peft model as it is before training, with the arguments of a LoraConfig."""
    base = AutoModelForCausalLM.from_pretrained(hub.DEMO, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(**{"r": 8, "target_modules": ["q_proj", "v_proj"], **options}))


def of_layers(*layers: int) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in TENSORS.items() if any(f".layers.{n}." in name for n in layers)}


def without(*parts: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in TENSORS.items() if not any(part in name for part in parts)}


COMPLETE: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = [
    ({}, TENSORS),
    ({"target_modules": "all-linear"}, TENSORS),
    ({"target_modules": ["all-linear"]}, TENSORS),
    ({"target_modules": "all-linear", "exclude_modules": ["v_proj"]}, without("v_proj")),
    ({"target_modules": r".*_proj"}, TENSORS),
    ({"target_modules": r".*layers\.[02]\..*_proj"}, of_layers(0, 2)),
    ({"layers_to_transform": [0, 3]}, of_layers(0, 3)),
    ({"layers_to_transform": 1, "layers_pattern": "layers"}, of_layers(1)),
    ({"exclude_modules": r".*layers\.[123]\..*"}, of_layers(0)),
    ({"target_modules": None}, without("k_proj", "o_proj", "mlp")),
    (
        {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
        {name: tensor for name, tensor in TENSORS.items() if "q_proj" in name or "layers.0.mlp.up_proj" in name},
    ),
]
INCOMPLETE: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
    ({}, of_layers(0), "21 of the 28 modules .*, such as model.layers.1.mlp.down_proj"),
    ({}, without("v_proj"), "4 of the 28"),
    ({}, without("layers.3.mlp.up_proj"), "1 of the 28 modules .*, such as model.layers.3.mlp.up_proj"),
    ({"target_modules": "all-linear"}, of_layers(0, 1, 2), "7 of the 28"),
    ({"target_modules": ["all-linear"]}, of_layers(0, 1, 2), "7 of the 28"),
    ({"target_modules": r".*_proj"}, of_layers(0, 1), "14 of the 28"),
    ({"layers_to_transform": [0, 1]}, of_layers(0), "7 of the 14"),
    ({"exclude_modules": ["k_proj"]}, without("k_proj", "q_proj"), "4 of the 24"),
    (
        {"target_modules": ["q_proj", "embed_tokens"]},
        without("k_proj"),
        "1 of the 5 modules .*, such as model.embed_tok",
    ),
    ({"target_modules": ["q_proj", "lm_head"]}, TENSORS, "1 of the 5 modules .*, such as lm_head"),
    ({}, without("layers.1.mlp.up_proj.lora_A"), "model.layers.1.mlp.up_proj has no lora_A"),
    ({}, without("layers.1.mlp.up_proj.lora_B"), "model.layers.1.mlp.up_proj has no lora_B"),
]


BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_proj", "v_proj"]}, "20 modules that .* does not target, by target_modules=.*mlp.down_proj"),
    ({"target_modules": r".*\.q_proj"}, "24 modules"),
    ({"exclude_modules": ["v_proj"]}, "4 modules .*, by .*exclude_modules=.*, such as model.layers.0.self_attn.v_proj"),
    ({"layers_to_transform": [0, 1]}, "14 modules .*, such as model.layers.2.mlp.down_proj"),
    ({"target_modules": "all-linear", "exclude_modules": ["v_proj"]}, "4 modules"),
]


@pytest.mark.parametrize(("options", "message"), BEYOND)
def test_adapter_with_modules_beyond_its_config_is_refused(options: dict[str, Any], message: str) -> None:
    """peft would ignore them, so the trainer's model does."""
    with pytest.raises(AdapterError, match=message):
        check(LoraConfig(**{"r": 8, "target_modules": list(LINEAR), **options}), TENSORS)


@pytest.mark.parametrize("targets", [["c_attn"], r"transformer\.h\..*", ["query", "key"]])
@pytest.mark.parametrize("renamed", [False, True])
def test_config_that_targets_no_module_of_the_model_is_refused(targets: list[str] | str, renamed: bool) -> None:
    """Also if the engine may know the tensors' modules under other names: completeness cannot be checked."""
    tensors = {name.replace("q_proj", "c_attn") if renamed else name: tensor for name, tensor in TENSORS.items()}
    with pytest.raises(AdapterError, match=r"targets no module of the model, by target_modules=.*The model has, for"):
        check(LoraConfig(r=8, target_modules=targets), tensors)


def test_pattern_of_the_names_of_another_transformers_is_matched_with_those() -> None:
    """The adapter's tensors have these names too, and differ from the model's by their prefix alone."""
    older = {name.replace(".model.layers.", ".language_model.model.layers."): t for name, t in TENSORS.items()}
    check(LoraConfig(r=8, target_modules=r"language_model\.model\.layers\..*_proj"), older)
    with pytest.raises(AdapterError, match=r"does not target, .* such as language_model.model.layers.0.self_attn.k_"):
        check(LoraConfig(r=8, target_modules=r"language_model\.model\.layers\..*(mlp|v|q|o).*_proj"), older)


def test_module_of_an_unknown_name_excuses_no_other() -> None:
    """The engine may have renamed it, but not those that the adapter lacks besides."""
    renamed = {name.replace("model.layers.3.", "blocks.three."): tensor for name, tensor in TENSORS.items()}
    check(LoraConfig(r=8, target_modules=list(LINEAR)), renamed)
    part = {name: tensor for name, tensor in renamed.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(AdapterError, match=r"incomplete: .* such as layers.1.mlp.up_proj"):
        check(LoraConfig(r=8, target_modules=list(LINEAR)), part)


def test_adapter_of_experts_that_the_checkpoint_stores_apart_is_complete(tmp_path: Path) -> None:
    """transformers stacks them; an older one, and the trainer with it, did not."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    checks, spec = AdapterChecks(tmp_path), read_model_spec(tmp_path)
    tensors = {}
    for name, weight in spec.weights.items():
        if name.endswith("up_proj.weight"):
            place = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{place}.lora_A.weight"] = torch.ones(2, weight.shape[1])
            tensors[f"{place}.lora_B.weight"] = torch.ones(weight.shape[0], 2)
    assert len(tensors) == 2 * 2 * 4
    peft: Any = LoraConfig(r=2, target_modules=["up_proj"])
    checks.check(describe_adapter(pack_adapter(peft, tensors)), spec)
    part = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts.3." not in name}
    with pytest.raises(AdapterError, match="1 of the 8 modules"):
        checks.check(describe_adapter(pack_adapter(peft, part)), spec)


@pytest.mark.parametrize(
    ("dtype", "half", "value", "options", "limit"),
    [
        ("F16", "lora_A", 1e5, {}, "65504"),
        ("F16", "lora_B", -4e4, {"lora_alpha": 16}, "65504"),
        ("F16", "lora_B", 4e4, {"lora_alpha": 8, "alpha_pattern": {"q_proj": 16}}, "65504"),
        ("F16", "lora_B", 4e4, {"lora_alpha": 8, "use_rslora": True}, "65504"),
        ("F32", "lora_A", 1e39, {}, "3.40282e+38"),
        ("F32", "lora_A", 1e5, {}, None),
        ("F16", "lora_A", 6e4, {"lora_alpha": 16}, None),
        ("F16", "lora_B", 4e4, {"lora_alpha": 8}, None),
        ("", "lora_A", 1e39, {}, None),
    ],
)
def test_adapter_whose_values_would_be_infinite_in_the_engine_is_refused(
    dtype: str, half: str, value: float, options: dict[str, Any], limit: str | None
) -> None:
    """By the dtype that the engine holds adapters in; vLLM multiplies lora_B by its scale in it."""
    tensors = {name: tensor.double() for name, tensor in TENSORS.items() if "q_proj" in name}
    name = f"model.layers.2.self_attn.q_proj.{half}.weight"
    tensors[f"base_model.model.{name}"][1, 1] = value
    config: Any = LoraConfig(**{"r": 8, "target_modules": ["q_proj"], **options})
    adapter = describe_adapter(pack_adapter(config, tensors))
    if limit is None:
        CHECKS.check(adapter, MODEL, dtype)
        return
    with pytest.raises(AdapterError, match=f"{name} reaches .* in {dtype}, up to {re.escape(limit)}: .*infinite"):
        CHECKS.check(adapter, MODEL, dtype)


@pytest.mark.parametrize(
    ("wrapper", "remedy"),
    [
        ("_orig_mod.", "torch.compile"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("_checkpoint_wrapped_module.", "activation checkpointing"),
        ("module.", "DistributedDataParallel"),
    ],
)
@pytest.mark.parametrize("place", ["", "base_model.model.", "base_model.model.model.layers.0."])
def test_name_of_a_trainers_wrapper_has_its_remedy(wrapper: str, remedy: str, place: str) -> None:
    """In the adapter's own names and in those of the model's tensors beside it, as in `update_weights`."""
    model = adapted()
    prefix = "base_model.model."
    tensors = get_peft_model_state_dict(model)

    def load(tensors: dict[str, torch.Tensor]) -> None:
        files = pack_adapter(model.peft_config["default"], tensors)
        adapter = describe_adapter(files)
        CHECKS.check(adapter, MODEL)
        engine = FakeEngine("fake", str(hub.DEMO), {})
        asyncio.run(engine.start())
        asyncio.run(engine.load_adapter(AdapterVersion(name="x", version=1, id=1, rank=8), files))

    load(tensors)
    wrapped = {name.replace(place, place + wrapper, 1) if place else wrapper + name: t for name, t in tensors.items()}
    beside = {f"{place or prefix}{wrapper}norm.weight": torch.ones(128)}
    for bad in (wrapped, {**tensors, **beside}):
        with pytest.raises(AdapterError, match=remedy):
            load(bad)


def test_lora_of_an_embedding_is_refused_with_its_remedy() -> None:
    """As peft saves it and in the model's state_dict."""
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    for tensors in (get_peft_model_state_dict(model), whole_state_dict(model)):
        with pytest.raises(AdapterError, match=r"embed_tokens.lora_embedding_A' .*Train without"):
            check(model.peft_config["default"], tensors)


@pytest.mark.parametrize(("options", "tensors"), COMPLETE)
def test_adapter_with_all_modules_of_its_config_is_taken(
    options: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Named in any way that peft knows."""
    check(LoraConfig(**{"r": 8, "target_modules": list(LINEAR), **options}), tensors)


@pytest.mark.parametrize(("options", "tensors", "message"), INCOMPLETE)
def test_adapter_without_a_module_of_its_config_is_refused(
    options: dict[str, Any], tensors: dict[str, torch.Tensor], message: str
) -> None:
    """Such a module would act as if it had not been trained."""
    with pytest.raises(AdapterError, match=message):
        check(LoraConfig(**{"r": 8, "target_modules": list(LINEAR), **options}), tensors)


def test_directory_of_an_incomplete_adapter_is_refused(tmp_path: Path) -> None:
    """By the same check."""
    from safetensors.torch import save_file

    random_adapter(seed=1).save_pretrained(tmp_path)
    CHECKS.check(describe_adapter(read_adapter(tmp_path)), MODEL)
    save_file(of_layers(0), tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="21 of the 28"):
        CHECKS.check(describe_adapter(read_adapter(tmp_path)), MODEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "(("}, "peft cannot read target_modules"),
        ({"target_modules": []}, "names no target_modules"),
        ({"rank_pattern": {"((": 8}}, "rank_pattern=.* is invalid"),
        ({"rank_pattern": {"q_proj": 4}}, "q_proj has rank 8, adapter_config.json says r=4"),
    ],
)
def test_config_that_names_no_modules_is_refused(options: dict[str, Any], message: str) -> None:
    """So is one whose patterns cannot be read, or give another rank."""
    with pytest.raises(AdapterError, match=message):
        check(LoraConfig(**{"r": 8, "target_modules": list(LINEAR), **options}), TENSORS)


def test_ranks_are_those_of_the_patterns() -> None:
    """Each module's own, not any of the config's."""
    model = adapted(rank_pattern={"v_proj": 4, r"layers\.0\.self_attn\.q_proj": 2})
    tensors = get_peft_model_state_dict(model)
    check(model.peft_config["default"], tensors)
    with pytest.raises(AdapterError, match=r"layers.0.self_attn.q_proj has rank 2, .* r=4"):
        check(LoraConfig(r=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2, "q_proj": 4}), tensors)


def test_modules_are_known_by_the_checkpoint_where_transformers_cannot_build_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model of its own code."""

    def refuse(path: Path) -> None:
        raise ValueError("no such model type")

    for name in ("_build_stored", "_build_causal_lm"):
        monkeypatch.setattr(f"twinkle_serve.engines.adapter_checks.{name}", refuse)
    checks = AdapterChecks(hub.DEMO)
    for target in ("all-linear", list(LINEAR)):
        config: Any = LoraConfig(r=8, target_modules=target)
        checks.check(describe_adapter(pack_adapter(config, TENSORS)), MODEL)
        with pytest.raises(AdapterError, match="21 of the 28"):
            checks.check(describe_adapter(pack_adapter(config, of_layers(0))), MODEL)


@pytest.mark.parametrize("alone", [True, False])
def test_adapter_of_the_language_model_alone_is_complete(tmp_path: Path, alone: bool) -> None:
    """Where the served model has others too, whose modules have the same names."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32}
    config = transformers.Gemma3Config(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14})
    served = transformers.Gemma3ForConditionalGeneration(config)
    served.save_pretrained(tmp_path)
    base = transformers.Gemma3ForCausalLM(config.text_config) if alone else served
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    tensors = get_peft_model_state_dict(model)
    checks, spec = AdapterChecks(tmp_path), read_model_spec(tmp_path)
    files = pack_adapter(model.peft_config["default"], tensors)
    checks.check(describe_adapter(files), spec)
    part = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    with pytest.raises(AdapterError, match=rf"no matrices for {2 if alone else 4} of the {4 if alone else 8} modules"):
        checks.check(describe_adapter(pack_adapter(model.peft_config["default"], part)), spec)


def whole_state_dict(model: Any) -> dict[str, Any]:
    return dict(model.state_dict())


def with_embeddings(model: Any) -> dict[str, Any]:
    return dict(get_peft_model_state_dict(model, save_embedding_layers=True))


def in_bfloat16(model: Any) -> dict[str, Any]:
    return {name: tensor if "lora_" in name else tensor.bfloat16() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("state_dict", [whole_state_dict, with_embeddings, in_bfloat16])
def test_tensors_of_the_base_model_beside_an_adapter_are_its_own(state_dict: Callable[[Any], dict[str, Any]]) -> None:
    """Unchanged, in the dtype that the trainer has them in: they say nothing new."""
    model = adapted()
    check(model.peft_config["default"], state_dict(model))


def resized(model: Any) -> dict[str, Any]:
    model.get_base_model().resize_token_embeddings(330, mean_resizing=False)
    return with_embeddings(model)


def trained_embeddings(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[7] += 0.1
    return with_embeddings(model)


def trained_norm(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        model.get_base_model().model.norm.weight[7] += 0.1
    return whole_state_dict(model)


def trained_base_layer(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight[0, 0] += 0.1
    return whole_state_dict(model)


def trained_head(model: Any) -> dict[str, Any]:
    tensors = whole_state_dict(model)
    return {**tensors, "base_model.model.lm_head.weight": tensors["base_model.model.lm_head.weight"] * 2}


def value_head(model: Any) -> dict[str, Any]:
    return {**whole_state_dict(model), "v_head.weight": torch.ones(1, 4)}


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (resized, r"'(lm_head|model.embed_tokens).weight' with the shape \(330, 128\), not \(320, 128\)"),
        (
            trained_embeddings,
            "'(lm_head|model.embed_tokens).weight' with values that the model's checkpoint does not have",
        ),
        (trained_norm, "'model.norm.weight' with values"),
        (trained_base_layer, "'model.layers.0.self_attn.q_proj.weight' with values"),
        (trained_head, "'lm_head.weight' with values"),
        (value_head, "'v_head.weight', which is neither LoRA nor a weight of the model"),
    ],
)
def test_tensors_that_were_trained_beside_an_adapter_are_refused(
    state_dict: Callable[[Any], dict[str, Any]], message: str
) -> None:
    """They would be ignored, as in an adapter's directory they are refused."""
    model = adapted()
    with pytest.raises(AdapterError, match=message):
        check(model.peft_config["default"], state_dict(model))
