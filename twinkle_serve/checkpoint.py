"""A model's weights under their checkpoint names: their files on disk, and buckets of them as bytes."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twinkle_serve import hub
from twinkle_serve.data_format.weights import Bucket, ModelSpec, WeightSpec
from twinkle_serve.errors import WeightsError
from twinkle_serve.extras import require_extra
from twinkle_serve.read_ahead import ReadAhead
from twinkle_serve.tensors import (
    BITS,
    DTYPES,
    AnyTensor,
    digest,
    encode_header,
    overflow,
    range_is_narrower,
)

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


HUBS = ("ms://", "hf://")
"""Beginnings of the names of models on hubs."""

AT_START = "module."
"""Added at the start of a name; within, it may be the model's own."""
ADDED_BY_WRAPPERS = {
    "_fsdp_wrapped_module.": "FSDP",
    "_orig_mod.": "torch.compile",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    AT_START: "DistributedDataParallel or DeepSpeed",
}
"""Parts of names, and the wrappers that add them. No model has them itself."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
"""Names of the input embedding's module."""
HEADS = ("lm_head.weight", "embed_out.weight")
"""Names of the output layer's weight."""


# -- files ---------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """Returns the safetensors files of a model in a directory, as transformers chooses them; empty if there are none.

    The files of the index where there is one, else the one that is named for the model. Without both, files that are
    named as parts of a model; or all, unless the model is in pickles. Other files, such as those of an optimizer or an
    adapter, are not the model's.

    Raises:
        WeightsError: the index cannot be read, or names a missing file; or loaders would read different files, as
            transformers prefers one file to the index and pickles to parts without an index, and vLLM does not.
    """
    if path.is_file():
        return [path]
    index, single = path / INDEX, path / SINGLE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [path / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} cannot be read: {type(error).__name__}: {error}.") from None
        if missing := [file.name for file in files if not file.is_file()]:
            raise WeightsError(
                f"{path.absolute()} has no {missing[0]}, which {INDEX} lists. Save the model again; or remove {INDEX} "
                "if it is of an earlier save."
            )
        if single.is_file() and files != [single]:
            raise _ambiguous(path, SINGLE, f"{INDEX}, which lists {len(files)} files such as {names[0]}")
        return files
    if single.is_file():
        return [single]
    pickles = sorted(path.glob("pytorch_model*.bin"))
    if parts := sorted(path.glob("model*.safetensors")):
        if pickles:
            raise _ambiguous(path, pickles[0].name, f"{parts[0].name}, which no index lists")
        return parts
    return [] if pickles else sorted(path.glob("*.safetensors"))


def _ambiguous(path: Path, one: str, other: str) -> WeightsError:
    return WeightsError(
        f"{path.absolute()} has {one} and also {other}: transformers would read the former, and vLLM the latter. "
        "Remove the one that is not the model's."
    )


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shape of each weight from the headers of the model's files; empty if there are none."""
    return {name: spec.shape for name, spec in _weight_specs(model).items()}


def _weight_specs(model: Path) -> dict[str, WeightSpec]:
    from safetensors import SafetensorError, safe_open

    specs: dict[str, WeightSpec] = {}
    for path in weight_files(model):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118
                    weight = file.get_slice(name)
                    specs[name] = WeightSpec(tuple(weight.get_shape()), str(weight.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
    return specs


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} cannot be read, it is cut off or damaged: {error}")


def read_model_spec(model: Path) -> ModelSpec:
    """Reads which weights a model has, from the headers of its files and its config.

    An output layer that shares the embedding's weights has names beside the checkpoint's own: trainers send it or leave
    it out. Where the checkpoint stores both with different values, they are not shared.

    Raises:
        WeightsError: files that cannot be read.
    """
    weights = _weight_specs(model)
    embedding = min((name for name in weights if _is_embedding(name)), key=len, default=None)
    if embedding is None:
        return ModelSpec(weights, {})
    stored = [name for name in weights if name.endswith(HEADS) and weights[name].shape == weights[embedding].shape]
    if not _config_ties(model, default=not stored):
        return ModelSpec(weights, {})
    parts = embedding.split(".")
    heads = {".".join([*parts[:i], head]) for i in range(len(parts) - 1) for head in HEADS} - weights.keys()
    same = {name for name in stored if _same_in_files(model, name, embedding)}
    if len(same) < len(stored):
        return ModelSpec(weights, {})
    return ModelSpec(weights, dict.fromkeys(sorted(heads | same), embedding))


def _is_embedding(name: str) -> bool:
    """Whether a weight is the model's input embedding, and not that of one of its layers."""
    parts = name.split(".")
    return name.endswith(".weight") and parts[-2] in EMBEDDINGS and not any(part.isdigit() for part in parts)


def _config_ties(model: Path, *, default: bool) -> bool:
    """Whether the model's config says that its output layer is its embedding.

    Args:
        default: answer where neither the config nor transformers says it.
    """
    try:
        config = json.loads((model / "config.json").read_text())
        parts = [config, *(config[key] for key in ("text_config", "llm_config") if config.get(key) is not None)]
        said = [bool(part["tie_word_embeddings"]) for part in parts if part.get("tie_word_embeddings") is not None]
    except (OSError, ValueError, AttributeError):
        return default
    if said or default:
        return any(said) if said else default
    try:
        from transformers import AutoConfig

        return bool(AutoConfig.from_pretrained(model).get_text_config().tie_word_embeddings)
    except Exception:  # a model of its own code, or of a newer transformers
        return default


def _same_in_files(model: Path, name: str, other: str) -> bool:
    """Whether two weights of a checkpoint have the same values."""
    return bool((_weight_in_files(model, name) == _weight_in_files(model, other)).all())


def hash_weight(model: Path, name: str, dtype: str) -> str:
    """Returns the hash of a weight in a model's files, see `digest`, as it would be in another dtype.

    Raises:
        WeightsError: files that cannot be read.
    """
    return _hash_as(_weight_in_files(model, name), dtype)


def _hash_as(weight: Tensor, dtype: str) -> str:
    import torch

    torch_name = next(key for key, (safetensors_name, _, _) in DTYPES.items() if safetensors_name == dtype)
    return digest(weight.to(getattr(torch, torch_name)))


def _weight_in_files(model: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    for path in weight_files(model):
        try:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118
                    weight: Tensor = file.get_tensor(name)
                    return weight
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
    raise WeightsError(f"{model} has no weight {name!r} any more. Save the model again.")


def find_overflow(model: Path, dtype: str) -> tuple[str, float] | None:
    """Returns a weight in a model's files that would become infinite in another dtype, and its largest magnitude.

    Scalars are left out, see `Upload`. Reads only weights whose dtype has more exponents.

    Args:
        dtype: safetensors' name.

    Raises:
        WeightsError: files that cannot be read.
    """
    specs = _weight_specs(model)
    wide = {name for name, spec in specs.items() if spec.shape and range_is_narrower(spec.dtype, dtype)}
    if not wide:
        return None
    import torch

    for name, tensor in named_tensors(model):
        if name in wide:
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            if (largest := overflow(specs[name].dtype, data, dtype)) is not None:
                return name, largest
    return None


# -- tensors -------------------------------------------------------------------------------------


def named_tensors(source: object) -> Iterator[tuple[str, Tensor]]:
    """Yields weights with their names, one at a time.

    Args:
        source: a model's directory with safetensors files or one such file; a model on a hub, `ms://org/name` or
            `hf://org/name`; a mapping of names to tensors, such as a `state_dict`; or an iterable of such pairs, which
            may be lazy.

    Raises:
        WeightsError: no such directory, unreadable files, or a source of another type.
        ModelNotFoundError, HubUnreachableError, IncompleteModelError: of a model on a hub.
        ConfigError: a directory or a file, and torch is not installed.
    """
    if isinstance(source, (str, os.PathLike)):
        yield from _tensors_in_files(source)
    elif isinstance(source, Mapping):
        yield from source.items()
    elif isinstance(source, Iterable):
        for item in source:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise WeightsError(f"weights must be pairs of name and tensor, got {type(item).__name__}.")
            yield item[0], item[1]
    else:
        raise WeightsError(f"weights must be a state_dict, pairs of name and tensor, or a path, got {source!r}.")


def _tensors_in_files(source: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    require_extra("reading weights from files", "server", "torch")
    try:
        name = os.fspath(source)
        path = hub.resolve(name) if name.startswith(HUBS) else Path(name).expanduser()
        files = weight_files(path)
    except (OSError, RuntimeError) as error:  # no permission; a name that no file can have; `~name` without such a user
        raise WeightsError(f"weights at {os.fspath(source)!r:.200} cannot be read: {error!s:.200}.") from None
    if not files:
        raise WeightsError(f"no safetensors files at {path.absolute()}. Save the model with save_pretrained.")
    with ReadAhead(files) as ahead:
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        tensor = tensors.get_tensor(name)
                        yield name, tensor
                        ahead.used(tensor.nbytes)
            except (SafetensorError, OSError) as error:
                raise _unreadable(file, error) from None


def without_wrappers(tensors: Iterable[tuple[str, AnyTensor]]) -> Iterator[tuple[str, AnyTensor]]:
    """Yields tensors without the parts of their names that a trainer's wrappers added; the log says so once of each."""
    told: set[str] = set()
    for name, tensor in tensors:
        own = name
        for part, wrapper in ADDED_BY_WRAPPERS.items():
            if not isinstance(name, str) or f".{part}" not in f".{own}":
                continue
            if part == AT_START and not own.startswith(part):
                continue
            if part not in told:
                told.add(part)
                logger.info(f"{wrapper} added {part!r} to the names of weights, such as {name}; it is left out")
            own = own.removeprefix(part) if part == AT_START else f".{own}".replace(f".{part}", ".")[1:]
        yield own, tensor


# -- buckets -------------------------------------------------------------------------------------


class PackedWeight(NamedTuple):
    """A weight in a bucket."""

    spec: WeightSpec
    begin: int
    """Index of its first byte in the bucket."""
    end: int


def read_bucket(bucket: Bucket) -> dict[str, PackedWeight]:
    """Reads the header of a bucket.

    Raises:
        WeightsError: not a complete safetensors file.
    """
    try:
        start = 8 + int.from_bytes(bucket[:8].tobytes(), "little")
        header = json.loads(bucket[8:start].tobytes())
        header.pop("__metadata__", None)
        weights = {}
        for name, entry in header.items():
            spec = WeightSpec(tuple(map(int, entry["shape"])), str(entry["dtype"]))
            begin, end = entry["data_offsets"]
            if 8 * (end - begin) != math.prod(spec.shape) * BITS[spec.dtype]:
                raise ValueError(f"{name} of shape {spec.shape} has {end - begin} bytes")
            weights[name] = PackedWeight(spec, start + begin, start + end)
        if (size := max(weight.end for weight in weights.values())) != len(bucket):
            raise ValueError(f"it has {len(bucket) - start} bytes of {size - start}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"a bucket of weights is cut off or damaged: {type(error).__name__}: {error}") from None
    return weights


def bucket_shapes(bucket: Bucket) -> dict[str, tuple[int, ...]]:
    """Reads the shape of each weight in a bucket; see `read_bucket`."""
    return {name: weight.spec.shape for name, weight in read_bucket(bucket).items()}


def hash_weights(bucket: Bucket, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Returns the hashes of weights in a bucket, as `hash_weight` those in files.

    Args:
        wanted: name, and dtype to hash it in, of each; those that the bucket does not have are left out.
    """
    present = read_bucket(bucket).keys()
    if not (wanted := [(name, dtype) for name, dtype in wanted if name in present]):
        return {}
    from safetensors.torch import load

    weights = load(bucket.tobytes())
    return {(name, dtype): _hash_as(weights[name], dtype) for name, dtype in wanted}


def without_weights(bucket: Bucket, names: set[str]) -> Bucket | None:
    """Returns a bucket without some of its weights; None if it has no others."""
    weights = {name: weight for name, weight in read_bucket(bucket).items() if name not in names}
    if not weights:
        return None
    # The widest items first: each must begin at a multiple of its size.
    order = sorted(weights.items(), key=lambda item: (-BITS[item[1].spec.dtype], item[1].begin))
    header: dict[str, dict[str, object]] = {}
    size = 0
    for name, weight in order:
        end = size + weight.end - weight.begin
        header[name] = {"dtype": weight.spec.dtype, "shape": list(weight.spec.shape), "data_offsets": [size, end]}
        size = end
    parts = [bucket[weight.begin : weight.end] for _, weight in order]
    file: Bucket = np.concatenate([np.frombuffer(encode_header(header), np.uint8), *parts])
    return file
