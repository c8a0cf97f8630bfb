"""Reads LoRA adapters from directories, and packs them from memory: safetensors only, never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.errors import AdapterError
from twinkle_serve.tensors import (
    DTYPES,
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


def of_memory(error: AdapterError) -> AdapterError:
    """Returns the error for an adapter that came from memory, where the names of peft's files say nothing."""
    return AdapterError(str(error).replace(CONFIG, "the LoraConfig").replace(WEIGHTS, "the state_dict"))
