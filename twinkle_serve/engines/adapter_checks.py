"""Checks of an adapter against the model that is to use it."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from twinkle_serve.adapter_description import AdapterDescription, check_range, check_shapes
from twinkle_serve.adapters import CONFIG
from twinkle_serve.checkpoint import hash_weight
from twinkle_serve.data_format.weights import ModelSpec, WeightsVersion
from twinkle_serve.errors import AdapterError
from twinkle_serve.tensors import WRAPPERS, find_remedy

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

TARGET_KEYS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys of a LoraConfig that say which modules have matrices."""

ALL_LINEAR = "all-linear"

BaseKey: TypeAlias = tuple[str, str]
"""Name of a weight in the checkpoint, and the dtype in which it is hashed."""


@dataclass(frozen=True, slots=True)
class _Modules:
    """Modules of a model that peft can give LoRA matrices."""

    type: str
    """Model type of the config; "" if it is unknown."""
    linear: frozenset[str]
    """Linear layers but the output layer."""
    others: frozenset[str]
    """Embeddings and the output layer."""


@dataclass(slots=True)
class BaseDigests:
    """Hashes of the weights of one version that replaced the checkpoint's."""

    version: WeightsVersion
    digests: dict[BaseKey, str] = field(default_factory=dict)
    outdated: bool = False
    """Whether the version that an adapter was compared with is gone."""


def base_keys(adapter: AdapterDescription, model: ModelSpec) -> set[BaseKey]:
    """Returns the keys of the weights that an adapter's tensors of the model itself are compared with."""
    return {(model.tied.get(name, name), tensor.spec.dtype) for name, tensor in adapter.base.items()}


class AdapterChecks:
    """Checks adapters against the files of one model. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: directory of the model.
        """
        self._path = path
        self._modules: list[_Modules] = []
        """Of each class that transformers has for the model; determined with the first adapter."""
        self._digests: dict[BaseKey, str] = {}
        """Hash of each weight of the checkpoint that was compared."""

    def check(
        self,
        adapter: AdapterDescription,
        model: ModelSpec,
        adapter_dtype: str = "",
        updated: BaseDigests | None = None,
    ) -> None:
        """Checks that an adapter is of this model and complete, and that nothing of it would be ignored or infinite.

        Args:
            adapter_dtype: see `EngineInfo`.
            updated: hashes of the weights that its base tensors are compared with; None: the checkpoint's.

        Raises:
            AdapterError
        """
        check_shapes(adapter, model.weights)
        check_range(adapter, adapter_dtype)
        self._check_base(adapter, model, updated)
        if not self._modules:
            self._modules = _read_modules(self._path, model)
        trained = (modules for modules in self._modules if adapter.modules <= modules.linear | modules.others)
        _check_modules(adapter, next(trained, self._modules[0]), model)

    def _check_base(self, adapter: AdapterDescription, model: ModelSpec, updated: BaseDigests | None) -> None:
        """Checks that the tensors beside the adapter's own are those of the model."""
        if updated is not None and updated.outdated:
            return
        for name, tensor in adapter.base.items():
            stored = model.tied.get(name, name)
            weight = model.weights.get(stored)
            if weight is None:
                remedy = find_remedy(name, WRAPPERS, "Pass state_dict=get_peft_model_state_dict(model).")
                raise AdapterError(
                    f"the adapter's state_dict has {name!r}, which is neither LoRA nor a weight of the model: it would "
                    f"be ignored. {remedy}"
                )
            same = weight.shape == tensor.spec.shape
            if not same or self._digest((stored, tensor.spec.dtype), updated) != tensor.digest:
                how = "values" if same else f"the shape {tensor.spec.shape}, not {weight.shape}, and so values"
                holder = "checkpoint does" if updated is None else f"weights {updated.version.label!r} do"
                raise AdapterError(
                    f"the adapter's state_dict has {name!r} with {how} that the model's {holder} not have: it was "
                    "trained or resized beside the LoRA matrices, and would be ignored. Train these alone, or send "
                    "the merged model with update_weights."
                )

    def _digest(self, key: BaseKey, updated: BaseDigests | None) -> str:
        if updated is not None:
            return updated.digests[key]
        if key not in self._digests:
            self._digests[key] = hash_weight(self._path, *key)
        return self._digests[key]


def _check_modules(adapter: AdapterDescription, modules: _Modules, model: ModelSpec) -> None:
    """Checks that an adapter has matrices for each module that its config names, and for no other.

    Modules that neither transformers nor the checkpoint has by that name are left to the engine, which may have renamed
    them: each excuses one missing module whose name ends alike.
    """
    built = modules.linear | modules.others
    present, stored = adapter.modules, {name.removesuffix(".weight") for name in model.weights}
    targets = _targets(adapter, modules, built | stored | present)
    promised, unknown = targets & built, set[str]()
    if present - built:  # named by another version of transformers, or of another model
        kinds = {_kind(name) for name in stored & present - built}
        promised |= {name for name in targets & stored if _kind(name) in kinds}
        known = {_without_prefix(name) for name in built | stored}
        promised, present = set(map(_without_prefix, promised)), set(map(_without_prefix, present))
        unknown = present - known
    # A pattern of full names may match those that the trainer's version of transformers gave to the model's modules.
    if not promised and (unknown or not adapter.modules & targets):
        raise AdapterError(
            f"{CONFIG} targets no module of the model, by {_said(adapter)}. The model has, for example, "
            f"{', '.join(sorted(modules.linear)[:2])}. Send the config that the adapter was trained with."
        )
    excused = Counter(map(_last_part, unknown))
    missing = sorted(promised - present)
    if Counter(map(_last_part, missing)) - excused:
        raise AdapterError(
            f"the adapter is incomplete: it has no matrices for {len(missing)} of the {len(promised)} modules that "
            f"{CONFIG} targets, such as {', '.join(missing[:3])}. Send the tensors of all, or a config that targets "
            "only the trained ones."
        )
    if extra := sorted(adapter.modules - targets):
        raise AdapterError(
            f"the adapter has matrices for {len(extra)} modules that {CONFIG} does not target, by {_said(adapter)}, "
            f"such as {', '.join(extra[:3])}: peft would ignore them. Send the config that they were trained with, or "
            "leave them out."
        )


def _kind(module: str) -> str:
    """Returns a module's name without the numbers of its layer and expert."""
    return re.sub(r"\d+", "#", module)


def _last_part(module: str) -> str:
    return module.rpartition(".")[2]


def _without_prefix(name: str) -> str:
    """Returns a module's name from its layer on: `layers.0.self_attn.q_proj`."""
    match = re.search(r"(?:^|\.)([^.]+\.\d+\..*)", name)
    return match[1] if match else name


def _targets(adapter: AdapterDescription, modules: _Modules, names: set[str] | frozenset[str]) -> set[str]:
    """Returns those of the modules that peft would give matrices, by the adapter's config."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    keys = {key: adapter.config.get(key) for key in TARGET_KEYS}
    if keys["target_modules"] is None:
        keys["target_modules"] = DEFAULTS.get(modules.type)
    if not keys["target_modules"]:
        raise AdapterError(f"{CONFIG} names no target_modules. Set them to the modules that were trained.")
    try:
        config: LoraConfig = LoraConfig(**keys)
        targets = config.target_modules
        if targets == {ALL_LINEAR} or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
            config.target_modules = (modules.linear | adapter.modules) - modules.others
        return {name for name in names if check_target_module_exists(config, name)}
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise AdapterError(f"{CONFIG}: peft cannot read {_said(adapter)}: {error}") from None


def _said(adapter: AdapterDescription) -> str:
    """Returns the keys of an adapter's config that say which modules have matrices."""
    keys = {key: adapter.config.get(key) for key in TARGET_KEYS}
    return ", ".join(f"{key}={value!r}" for key, value in keys.items() if value is not None) or "its target_modules"


def _read_modules(path: Path, model: ModelSpec) -> list[_Modules]:
    """Returns a model's modules, as transformers builds it: as it is stored, and as a language model alone.

    By the names of its weights where transformers cannot build it.
    """
    built = []
    for build in (_build_stored, _build_causal_lm):
        with contextlib.suppress(Exception):  # a model of its own code, or one that transformers does not know
            built.append(_modules_of(build(path)))
    if built:
        return built
    weights = [name.removesuffix(".weight") for name, weight in model.weights.items() if len(weight.shape) == 2]
    # transformers stacks experts, and does not build layers for predicting several tokens.
    kept = [name for name in weights if not re.search(r"\.experts\.|^mtp\.", name)]
    others = {name for name in kept if re.search(r"embed|wte|wpe|lm_head", name.rpartition(".")[2])}
    return [_Modules("", frozenset(kept) - others, frozenset(others))]


def _build_stored(path: Path) -> PreTrainedModel:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, config.architectures[0])(config)
    return model


def _build_causal_lm(path: Path) -> PreTrainedModel:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model


def _modules_of(model: PreTrainedModel) -> _Modules:
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear, others = set(), set()
    for name, module in model.named_modules():
        if module is head or isinstance(module, torch.nn.Embedding):
            others.add(name)
        elif isinstance(module, (torch.nn.Linear, Conv1D)):
            linear.add(name)
    return _Modules(model.config.model_type, frozenset(linear), frozenset(others))
