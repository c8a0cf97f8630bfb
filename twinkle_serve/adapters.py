"""Reads and checks LoRA adapters: safetensors only, never a pickle."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.data_format.weights import WeightSpec
from twinkle_serve.errors import AdapterError
from twinkle_serve.tensors import (
    DTYPES,
    FLOAT_READERS,
    MAX_FINITE,
    WRAPPERS,
    AnyTensor,
    TensorFile,
    Tensors,
    digest,
    dtype_name,
    find_remedy,
    gathered,
    is_tensor,
)

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""peft's prefix of module names."""

EMBEDDING = (
    "It is of an embedding. Train without it in target_modules, or send the merged model with update_weights if its "
    "embedding and output layer are not tied."
)
"""What to do about the LoRA of an embedding."""

OWN_WRAPPERS = {part: remedy for part, remedy in WRAPPERS.items() if part.startswith("_")}
"""Remedies for parts of names that no model has itself."""

BASE = "twinkle_serve.base"
"""Key of the weights' metadata: the dtype, shape and hash of tensors of a state_dict that are not the adapter's."""


def absolute_directory(path: str | os.PathLike[str]) -> str:
    """Returns the absolute path of an adapter: the router's process has another working directory.

    Raises:
        AdapterError: not the path of a directory.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise AdapterError(f"an adapter's directory must be a path, got {path!r}.")
    if "://" in str(path):
        raise AdapterError(f"an adapter is loaded from a directory, got {str(path)!r}. Download it first.")
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:  # `~name` without such a user
        raise AdapterError(f"an adapter's directory must be a path, got {path!r}: {error}") from None


def read_adapter(path: str | Path) -> AdapterFiles:
    """Reads an adapter that peft saved in a directory.

    Raises:
        AdapterError: no such directory, no adapter in it, or one that cannot be read.
    """
    try:
        return _read(path, Path(path).expanduser())
    except (OSError, ValueError) as error:  # no permission; a name that no file can have
        raise AdapterError(f"adapter {str(path)!r} cannot be read: {error}.") from None


def _read(path: str | Path, directory: Path) -> AdapterFiles:
    if not directory.is_dir():
        raise AdapterError(f"adapter {str(path)!r}: no directory at {directory.absolute()}. Check the path.")
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            names = sorted(item.name for item in directory.iterdir())[:8]
            raise AdapterError(
                f"adapter {str(path)!r}: {directory.absolute()} has no {name}, it has {', '.join(names) or 'nothing'}. "
                "Save the adapter with peft's save_pretrained, as safetensors."
            )
    return AdapterFiles(config=(directory / CONFIG).read_bytes(), weights=(directory / WEIGHTS).read_bytes())


def pack_adapter(config: LoraConfig, state_dict: Tensors | None) -> AdapterFiles:
    """Packs an adapter from a trainer's memory.

    Args:
        config: peft's LoraConfig.
        state_dict: the adapter's tensors by name, or pairs of both, named as in peft's `get_peft_model_state_dict` or
            in the model's own `state_dict`. Of other tensors the hashes are packed: an engine refuses those that are
            not its model's own.

    Raises:
        AdapterError: no LoRA tensors, tensors of several adapters or without values, or not a LoraConfig.
    """
    if not hasattr(config, "to_dict") or not hasattr(config, "peft_type"):
        raise AdapterError(
            f"an adapter must be a directory, or peft's LoraConfig with a state_dict, got {type(config).__name__}."
        )
    if state_dict is None:
        raise AdapterError("a LoraConfig alone has no weights. Pass state_dict=get_peft_model_state_dict(model).")
    tensors: dict[str, AnyTensor] = {}
    base: dict[str, tuple[str, list[int], str]] = {}
    adapters: set[str] = set()
    first = None
    for name, given in _pairs(state_dict):
        tensor, first = _tensor(name, given), first or name
        if remedy := find_remedy(name, OWN_WRAPPERS, ""):
            raise AdapterError(f"state_dict has {name!r}. {remedy}")
        if "lora_" not in name:
            if _base_name(name) in base:
                raise AdapterError(f"state_dict has {_base_name(name)!r} twice, once as {name!r}.")
            base[_base_name(name)] = (DTYPES[dtype_name(tensor)][0], list(tensor.shape), digest(tensor))
            continue
        saved, adapter = _saved_name(name)
        adapters.add(adapter)
        if saved in tensors or len(adapters) > 1:
            raise AdapterError(
                f"state_dict has tensors of several adapters, one of them as {name!r}. Pass only one: "
                "state_dict=get_peft_model_state_dict(model, adapter_name=…)."
            )
        # A lazy mapping may use the memory again for the next one.
        tensors[saved] = tensor.copy() if isinstance(tensor, np.ndarray) else tensor.to("cpu", copy=True)
    if not tensors:
        found = "it is empty" if first is None else f"its first name is {first!r}"
        raise AdapterError(
            f"state_dict has no LoRA weights, {found}. Pass state_dict=get_peft_model_state_dict(model)."
        )
    weights = _pack(tensors, {BASE: json.dumps(base)} if base else None)
    return AdapterFiles(config=json.dumps(config.to_dict(), default=_plain).encode(), weights=weights)


def _pairs(state_dict: Tensors) -> Iterator[tuple[str, AnyTensor]]:
    """Yields names and tensors. Raises AdapterError for anything else."""
    if isinstance(state_dict, Mapping):
        yield from state_dict.items()
        return
    for item in state_dict if isinstance(state_dict, Iterable) and not isinstance(state_dict, str) else [state_dict]:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise AdapterError(f"state_dict must map names to tensors, or be pairs of both, got {item!r:.80}.")
        yield item[0], item[1]


def _tensor(name: str, tensor: object) -> AnyTensor:
    """See `gathered`. Raises AdapterError."""
    if not isinstance(name, str) or not is_tensor(tensor):
        raise AdapterError(f"state_dict must map names to tensors, got {name!r} and {type(tensor).__name__}.")
    try:
        return gathered(tensor)
    except ValueError as error:
        raise AdapterError(f"tensor {name!r} of the adapter {error}") from error


def _pack(tensors: Mapping[str, AnyTensor], metadata: Mapping[str, str] | None) -> bytes:
    file = TensorFile(sum(tensor.nbytes for tensor in tensors.values()))
    # The widest items first: each must begin at a multiple of its size.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-DTYPES[dtype_name(item[1])][1], item[0])):
        try:
            file.add(name, tensor)
        except ValueError as error:
            raise AdapterError(f"tensor {name!r} of the adapter {error}") from error
    return file.finish(metadata).tobytes()


def _base_name(name: str) -> str:
    """Returns the checkpoint's name of a tensor of peft's model."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _saved_name(name: str) -> tuple[str, str]:
    """Returns the name under which peft saves a tensor, without the adapter's name after `lora_A`, and that name."""
    parts, adapter = name.split("."), ""
    for i, part in enumerate(parts[:-1]):
        if part.startswith("lora_") and parts[i + 1] != "weight":
            adapter = parts.pop(i + 1)
            break
    saved = ".".join(parts)
    return saved if saved.startswith(PREFIX) else PREFIX + saved, adapter


def _plain(value: object) -> object:
    """Converts values of a LoraConfig that json cannot encode: sets, enums and dtypes."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))


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
    if bad := int((~np.isfinite(values)).sum()):
        raise AdapterError(f"{WEIGHTS}: {name} has {bad} values of {values.size} that are not finite.")
    return float(np.abs(values).max(initial=0))


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


def of_memory(error: AdapterError) -> AdapterError:
    """Returns the error for an adapter that came from memory, where the names of peft's files say nothing."""
    return AdapterError(str(error).replace(CONFIG, "the LoraConfig").replace(WEIGHTS, "the state_dict"))
