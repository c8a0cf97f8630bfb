"""Describes LoRA adapters by their files, and checks them."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np

from twinkle_serve.adapters import BASE, CONFIG, PREFIX, WEIGHTS
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.data_format.weights import WeightSpec
from twinkle_serve.errors import AdapterError
from twinkle_serve.tensors import FLOAT_READERS, MAX_FINITE, WRAPPERS, find_remedy

EMBEDDING = (
    "It is of an embedding. Train without it in target_modules, or send the merged model with update_weights if its "
    "embedding and output layer are not tied."
)
"""What to do about the LoRA of an embedding."""


class BaseTensor(NamedTuple):
    """A tensor of the base model, as a trainer has it."""

    spec: WeightSpec
    digest: str
    """Hash of its values, see `digest`."""


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """An adapter's rank, config and tensor shapes."""

    rank: int
    """Largest rank of its modules."""
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Shape of each tensor, named without peft's prefix: `model.layers.0.self_attn.q_proj.lora_A.weight`."""

    largest: dict[str, float]
    """Largest magnitude in each tensor, by the same names; of lora_B also once scaled by alpha / rank, as in vLLM."""

    checksum: int
    """Of the tensors, independent of their order in the file."""

    base: Mapping[str, BaseTensor]
    """Tensors that were sent beside the adapter's, by their names in the checkpoint, whose own they must be."""

    @property
    def modules(self) -> set[str]:
        """Names of the modules that the adapter changes."""
        return {name.split(".lora_")[0] for name in self.shapes}


SUPPORTED: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
"""Supported values of a LoraConfig: with others, some engine would ignore a part of the adapter."""

PEFT_ALPHA = 8
"""peft's lora_alpha where a config has none."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Initialisations that leave the base model unchanged; others, such as PiSSA, change it."""


class _RawTensor(TypedDict):
    """A tensor as safetensors deserializes it."""

    dtype: str
    shape: list[int]
    data: bytes


def describe_adapter(files: AdapterFiles) -> AdapterDescription:
    """Parses an adapter and checks that it is consistent in itself.

    Raises:
        AdapterError: an unreadable file, an adapter of another kind than LoRA, or tensors that are not finite or have
            contradictory shapes.
    """
    import safetensors

    try:
        config = json.loads(files.config)
    except ValueError as error:
        raise AdapterError(f"{CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{CONFIG}: peft_type is {kind!r}. Only LORA is supported.")
    for key, allowed in SUPPORTED.items():
        if config.get(key) not in allowed:
            raise AdapterError(f"{CONFIG}: {key}={config[key]!r} is not supported. Train with {key}={allowed[0]!r}.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        raise AdapterError(
            f"{CONFIG}: init_lora_weights={init!r} changes the base model. Convert the adapter with peft's "
            "path_initial_model_for_weight_conversion."
        )
    try:
        tensors: dict[str, _RawTensor] = dict(safetensors.deserialize(files.weights))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{WEIGHTS} cannot be read, it is cut off or damaged: {error}") from None
    shapes, largest, checksum = {}, {}, 0
    for name, tensor in sorted(tensors.items()):
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or len(tensor["shape"]) != 2:
            remedy = EMBEDDING if ".lora_embedding_" in name else "Use an adapter of linear layers alone."
            remedy = find_remedy(name, WRAPPERS, remedy)
            raise AdapterError(
                f"{WEIGHTS} has {name!r} of shape {tensor['shape']}, which is not the LoRA of a linear layer. {remedy}"
            )
        own_name = name.removeprefix(PREFIX)
        shapes[own_name], largest[own_name] = tuple(tensor["shape"]), _largest_of(name, tensor)
        checksum = zlib.crc32(tensor["data"], checksum)
    if not shapes:
        raise AdapterError(f"{WEIGHTS} has no tensors.")
    rank = _check_pairs(shapes, config)
    for name in largest:
        if name.endswith(".lora_B.weight"):
            largest[name] *= max(1.0, _scale_of(name.split(".lora_")[0], config))
    return AdapterDescription(rank, config, shapes, largest, checksum, _read_base(files.weights))


def _read_base(weights: bytes) -> dict[str, BaseTensor]:
    """Reads which tensors were sent beside the adapter's, from its metadata."""
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    try:
        base = json.loads((header.get("__metadata__") or {}).get(BASE, "{}"))
        return {name: BaseTensor(WeightSpec(tuple(shape), dtype), said) for name, (dtype, shape, said) in base.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{WEIGHTS}: its metadata has no valid {BASE}: {error}") from None


def _check_pairs(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> int:
    """Checks that each module has both halves, of the rank that the config gives it. Returns the largest rank."""
    ranks = []
    for module in sorted({name.split(".lora_")[0] for name in shapes}):
        halves = [shapes.get(f"{module}.lora_{half}.weight") for half in "AB"]
        if halves[0] is None or halves[1] is None:
            missing = "lora_A" if halves[0] is None else "lora_B"
            raise AdapterError(f"the adapter's {module} has no {missing}.")
        if halves[0][0] != halves[1][1]:
            raise AdapterError(
                f"the adapter's {module} has lora_A of rank {halves[0][0]} and lora_B of rank {halves[1][1]}."
            )
        if halves[0][0] != (rank := _of_module(module, config, "rank_pattern", "r")):
            # The scale of an adapter is alpha / rank, with the config's rank.
            raise AdapterError(f"{module} has rank {halves[0][0]}, {CONFIG} says r={rank}. They must agree.")
        ranks.append(halves[0][0])
    return max(ranks)


def _of_module(module: str, config: Mapping[str, Any], patterns: str, default: str) -> Any:
    """Returns a module's value: of the first key of the patterns that matches the end of its name, or else the default.

    Args:
        patterns: key of the config, such as rank_pattern.
        default: key of the config, such as r.
    """
    try:
        for key, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
    except (re.error, AttributeError) as error:
        raise AdapterError(f"{CONFIG}: {patterns}={config[patterns]!r} is invalid: {error}.") from None
    return config.get(default)


def _scale_of(module: str, config: Mapping[str, Any]) -> float:
    rank = _of_module(module, config, "rank_pattern", "r")
    alpha = _of_module(module, {"lora_alpha": PEFT_ALPHA, **config}, "alpha_pattern", "lora_alpha")
    try:
        return float(abs(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank))
    except (TypeError, ZeroDivisionError):
        raise AdapterError(f"{CONFIG}: lora_alpha={alpha!r} of {module} is not a number.") from None


def _largest_of(name: str, tensor: _RawTensor) -> float:
    """Returns the largest magnitude of a tensor. Raises AdapterError for NaN and infinite values."""
    if tensor["dtype"] not in FLOAT_READERS:
        raise AdapterError(f"{WEIGHTS}: {name} has dtype {tensor['dtype']}. Save it as float32, bfloat16 or float16.")
    values = FLOAT_READERS[tensor["dtype"]](np.frombuffer(tensor["data"], np.uint8))
    if values.size != math.prod(tensor["shape"]):
        raise AdapterError(f"{WEIGHTS}: {name} has {values.size} values for shape {tensor['shape']}.")
    low, high = values.min(initial=0), values.max(initial=0)  # NaN if there is one
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~np.isfinite(values)).sum())
        raise AdapterError(f"{WEIGHTS}: {name} has {bad} values of {values.size} that are not finite.")
    return float(max(-low, high))


def check_range(adapter: AdapterDescription, dtype: str) -> None:
    """Rejects an adapter with values that would be infinite in an engine.

    Args:
        dtype: safetensors' name of the dtype that the engine has adapters in.

    Raises:
        AdapterError
    """
    for name, largest in adapter.largest.items():
        if largest > (limit := MAX_FINITE.get(dtype, math.inf)):
            raise AdapterError(
                f"the adapter's {name} reaches {largest:g}, with its scale of alpha / rank; the engine holds adapters "
                f"in {dtype}, up to {limit:g}: its values would become infinite. Start the service with an "
                "engine_args.dtype of larger range, or train within this one."
            )


def check_shapes(adapter: AdapterDescription, weights: Mapping[str, WeightSpec]) -> None:
    """Rejects an adapter of another model, by the shapes of the model's own weights.

    Modules that the checkpoint does not name are left to the engine, which may have renamed them.

    Args:
        weights: of the model's checkpoint.

    Raises:
        AdapterError
    """
    for module in adapter.modules:
        weight = weights.get(f"{module}.weight")
        if weight is None or len(shape := weight.shape) != 2:
            continue
        adapter_shape = adapter.shapes[f"{module}.lora_B.weight"][0], adapter.shapes[f"{module}.lora_A.weight"][1]
        if adapter_shape != shape:
            raise AdapterError(
                f"the adapter belongs to another model: {module} is {shape[0]} x {shape[1]} here, in the adapter "
                f"{adapter_shape[0]} x {adapter_shape[1]}. Use the model that it was trained on."
            )


def not_in_model(modules: set[str]) -> AdapterError:
    """Returns the error for an adapter's modules that the model lacks."""
    names = sorted(modules)
    remedy = find_remedy(
        names[0],
        WRAPPERS,
        "Use the model that it was trained on, and only modules for which the engine supports LoRA.",
    )
    return AdapterError(
        f"{len(modules)} modules of the adapter are not in the model, such as {', '.join(names[:3])}, and would be "
        f"ignored. {remedy}"
    )
