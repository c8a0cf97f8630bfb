"""Reading and checking LoRA adapters. Only safetensors, never a pickle."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.errors import AdapterError
from twinkle_serve.tensors import gathered, on_host, to_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What peft puts in front of a module's name."""


def read_adapter(path: str | Path) -> AdapterFiles:
    """The adapter that peft saved in a directory.

    Raises:
        AdapterError: no such directory, or no adapter in it.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise AdapterError(f"adapter {str(path)!r}: no directory at {directory.absolute()}. Check the path.")
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            there = sorted(item.name for item in directory.iterdir())[:8]
            raise AdapterError(
                f"adapter {str(path)!r}: {directory.absolute()} has no {name}, it has {', '.join(there) or 'nothing'}. "
                "Save the adapter with peft's save_pretrained, as safetensors."
            )
    return AdapterFiles(config=(directory / CONFIG).read_bytes(), weights=(directory / WEIGHTS).read_bytes())


def pack_adapter(config: Any, state_dict: Mapping[str, Any] | None) -> AdapterFiles:
    """An adapter out of a trainer's memory.

    Args:
        config: peft's LoraConfig.
        state_dict: its tensors, named as peft's `get_peft_model_state_dict` or as the model's own `state_dict` names
            them; tensors of that which are not of an adapter are left out.

    Raises:
        AdapterError: no tensors, or not a LoraConfig.
    """
    if not hasattr(config, "to_dict") or not hasattr(config, "peft_type"):
        raise AdapterError(
            f"an adapter is a directory or peft's LoraConfig with a state_dict, got {type(config).__name__}."
        )
    if not state_dict:
        raise AdapterError("a LoraConfig alone has no weights. Give state_dict=get_peft_model_state_dict(model).")
    tensors: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        if "lora_" in name:
            if (saved := _saved_name(name)) in tensors:
                raise AdapterError(
                    f"state_dict holds {saved} of several adapters, one of them as {name!r}. Give that of one: "
                    "state_dict=get_peft_model_state_dict(model, adapter_name=…)."
                )
            tensors[saved] = tensor
    if not tensors:
        raise AdapterError(
            f"state_dict holds no LoRA weights, its names are such as {next(iter(state_dict))!r}. "
            "Give state_dict=get_peft_model_state_dict(model)."
        )
    weights = to_safetensors({name: on_host(gathered(tensor)) for name, tensor in tensors.items()})
    return AdapterFiles(config=json.dumps(config.to_dict(), default=_plain).encode(), weights=weights)


def _saved_name(name: str) -> str:
    """The name under which peft saves a tensor: without the adapter's own name behind `lora_A`."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in ("lora_A", "lora_B") and parts[i + 1] != "weight":
            del parts[i + 1]
            break
    saved = ".".join(parts)
    return saved if saved.startswith(PREFIX) else PREFIX + saved


def _plain(value: Any) -> Any:
    """What json does not know of a LoraConfig: sets, enums and dtypes."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """What an adapter says of itself."""

    rank: int
    """Largest rank of its modules."""
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Shape of each tensor, named without peft's prefix: `model.layers.0.self_attn.q_proj.lora_A.weight`."""

    checksum: int
    """Of the tensors, whatever order the file has them in."""

    @property
    def modules(self) -> set[str]:
        """Names of the modules that it changes."""
        return {name.split(".lora_")[0] for name in self.shapes}


SUPPORTED: dict[str, tuple[Any, ...]] = {
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
"""Values that a LoraConfig may have: with others, one engine or the other would leave a part of the adapter out."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways to begin training that leave the base model as it is; others, such as PiSSA, change it."""


def describe_adapter(files: AdapterFiles) -> AdapterDescription:
    """What an adapter says of itself, checked in itself.

    Raises:
        AdapterError: a file that cannot be read, an adapter of another kind than LoRA, tensors that are not finite or
            whose shapes contradict each other.
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
        tensors = dict(safetensors.deserialize(files.weights))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{WEIGHTS} cannot be read, it is cut off or damaged: {error}") from None
    shapes, checksum = {}, 0
    for name, tensor in sorted(tensors.items()):
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or len(tensor["shape"]) != 2:
            raise AdapterError(
                f"{WEIGHTS} holds {name!r} of shape {tensor['shape']}, which is no LoRA of a linear layer."
            )
        _check_finite(name, tensor)
        shapes[name.removeprefix(PREFIX)] = tuple(tensor["shape"])
        checksum = zlib.crc32(tensor["data"], checksum)
    if not shapes:
        raise AdapterError(f"{WEIGHTS} holds no tensors.")
    return AdapterDescription(_check_pairs(shapes, config), config, shapes, checksum)


def _check_pairs(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> int:
    """Every module has both halves, of one rank that the config names. Returns the largest."""
    ranks = []
    named = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    for module in sorted({name.split(".lora_")[0] for name in shapes}):
        halves = [shapes.get(f"{module}.lora_{half}.weight") for half in "AB"]
        if halves[0] is None or halves[1] is None:
            missing = "lora_A" if halves[0] is None else "lora_B"
            raise AdapterError(f"{WEIGHTS}: {module} has no {missing}.")
        if halves[0][0] != halves[1][1]:
            raise AdapterError(
                f"{WEIGHTS}: {module} has lora_A of rank {halves[0][0]} and lora_B of rank {halves[1][1]}."
            )
        if halves[0][0] not in named:
            # The scale of an adapter is alpha / rank, of the config's rank.
            raise AdapterError(f"{module} has rank {halves[0][0]}, {CONFIG} says r={config.get('r')}. They must agree.")
        ranks.append(halves[0][0])
    return max(ranks)


def _check_finite(name: str, tensor: Mapping[str, Any]) -> None:
    """bfloat16 is the upper half of a float32; numpy has no other way to read it."""
    kinds = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    if tensor["dtype"] == "BF16":
        values = (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif tensor["dtype"] in kinds:
        values = np.frombuffer(tensor["data"], kinds[tensor["dtype"]])
    else:
        raise AdapterError(f"{WEIGHTS}: {name} is of dtype {tensor['dtype']}. Save it as float32, bfloat16 or float16.")
    if values.size != math.prod(tensor["shape"]):
        raise AdapterError(f"{WEIGHTS}: {name} has {values.size} values for shape {tensor['shape']}.")
    if bad := int((~np.isfinite(values)).sum()):
        raise AdapterError(f"{WEIGHTS}: {name} holds {bad} values of {values.size} that are not finite.")


def check_shapes(adapter: AdapterDescription, weights: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses an adapter of another model, by the shapes of the model's own weights.

    Modules that the checkpoint does not name are for the engine to judge: it may have renamed them.

    Args:
        weights: shape of each weight of the model's checkpoint.

    Raises:
        AdapterError
    """
    for module in adapter.modules:
        shape = weights.get(f"{module}.weight")
        if shape is None or len(shape) != 2:
            continue
        have = adapter.shapes[f"{module}.lora_B.weight"][0], adapter.shapes[f"{module}.lora_A.weight"][1]
        if have != shape:
            raise AdapterError(
                f"the adapter is of another model: {module} is {shape[0]} x {shape[1]} here, the adapter's "
                f"{have[0]} x {have[1]}. Use the model that it was trained on."
            )


def not_in_model(modules: set[str]) -> AdapterError:
    """The error for modules of an adapter that the model lacks."""
    some = ", ".join(sorted(modules)[:3])
    return AdapterError(
        f"{len(modules)} modules of the adapter are not in the model, such as {some}: it would answer as if they were "
        "not there. Use the model that it was trained on, and keep to modules where the engine has LoRA."
    )
