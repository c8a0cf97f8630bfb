"""A model's weights under their checkpoint names: their shapes on disk, and buckets of them as bytes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.errors import WeightsError
from twinkle_serve.extras import require_extra
from twinkle_serve.tensors import AnyTensor, count_nonfinite, gathered, on_host, to_safetensors

if TYPE_CHECKING:
    from torch import Tensor

BUCKET_BYTES = 256 * 2**20

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1, "I8": 1}
"""Bytes per value, by safetensors' name of the dtype."""


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shape of each weight from the headers of the safetensors files; empty if there are none."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def named_tensors(source: object) -> Iterator[tuple[str, Tensor]]:
    """Yields weights with their names, one at a time.

    Args:
        source: a directory with safetensors files or one such file; a mapping of names to tensors, such as a
            `state_dict`; or an iterable of such pairs, which may be lazy.

    Raises:
        WeightsError: no such directory, unreadable files, or a source of another type.
        ConfigError: a directory or a file, and torch is not installed.
    """
    if isinstance(source, (str, os.PathLike)):
        yield from _tensors_in_files(Path(source).expanduser())
    elif isinstance(source, Mapping):
        yield from source.items()
    elif isinstance(source, Iterable):
        for item in source:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise WeightsError(f"weights must be pairs of name and tensor, got {type(item).__name__}.")
            yield item[0], item[1]
    else:
        raise WeightsError(f"weights must be a state_dict, pairs of name and tensor, or a path, got {source!r}.")


def _tensors_in_files(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    require_extra("reading weights from files", "server", "torch")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"no safetensors files at {path.absolute()}. Save the model with save_pretrained.")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} cannot be read, it is cut off or damaged: {error}") from None


def buckets(
    tensors: Iterable[tuple[str, AnyTensor]], bucket_bytes: int = BUCKET_BYTES, *, allow_nonfinite: bool = False
) -> Iterator[Bucket]:
    """Packs weights into buckets of about `bucket_bytes`, each of at least one tensor; holds one in memory at a time.

    A sharded tensor (DTensor) is gathered when its turn comes, so every rank of its mesh must take part.

    Raises:
        WeightsError: an item that is not a tensor, a repeated name, or values that are not finite.
    """
    pending: dict[str, AnyTensor] = {}
    size, names = 0, set[str]()
    for name, tensor in tensors:
        if not isinstance(name, str) or not hasattr(tensor, "shape"):
            raise WeightsError(f"weights must be pairs of name and tensor, got {name!r} and {type(tensor).__name__}.")
        if name in names:
            raise WeightsError(f"weight {name!r} comes twice.")
        names.add(name)
        whole = gathered(tensor)
        if isinstance(whole, np.ndarray) and whole.dtype.kind in "OSUMm":
            raise WeightsError(f"weight {name!r} is an array of {whole.dtype}, not of numbers.")
        if not allow_nonfinite and (bad := count_nonfinite(whole)):
            raise WeightsError(
                f"weight {name!r} has {bad} values of {math.prod(whole.shape)} that are not finite. "
                "Pass allow_nonfinite=True if that is intended."
            )
        nbytes = whole.nbytes
        if pending and size + nbytes > bucket_bytes:
            yield np.frombuffer(to_safetensors(pending), np.uint8)
            pending, size = {}, 0
        pending[name] = on_host(whole)
        size += nbytes
    if pending:
        yield np.frombuffer(to_safetensors(pending), np.uint8)


def bucket_shapes(bucket: Bucket) -> dict[str, tuple[int, ...]]:
    """Reads the shape of each weight in a bucket from its header.

    Raises:
        WeightsError: not a complete safetensors file.
    """
    try:
        start = 8 + int.from_bytes(bucket[:8].tobytes(), "little")
        header = json.loads(bucket[8:start].tobytes())
        header.pop("__metadata__", None)
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if end - begin != math.prod(shapes[name]) * DTYPES[entry["dtype"]]:
                raise ValueError(f"{name} of shape {shapes[name]} has {end - begin} bytes")
        if (size := max(entry["data_offsets"][1] for entry in header.values())) != len(bucket) - start:
            raise ValueError(f"it has {len(bucket) - start} bytes of {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"a bucket of weights is cut off or damaged: {type(error).__name__}: {error}") from None
    return shapes
