"""Tensors of torch and arrays of numpy as safetensors files. torch is imported only for torch tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

AnyTensor: TypeAlias = "Tensor | NDArray[Any]"


def gathered(tensor: AnyTensor) -> AnyTensor:
    """The full tensor, detached and on its device; anything but a torch tensor becomes a numpy array.

    A sharded tensor (DTensor) is gathered, in which every rank of its mesh must take part.
    """
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach() if hasattr(full, "detach") else np.asarray(full)


def on_host(tensor: AnyTensor) -> AnyTensor:
    """A gathered tensor or array, contiguous and in host memory."""
    return np.asarray(tensor, order="C") if isinstance(tensor, np.ndarray) else tensor.cpu().contiguous()


def count_nonfinite(tensor: AnyTensor) -> int:
    """Counts the values of a gathered tensor or array that are NaN or infinite."""
    if isinstance(tensor, np.ndarray):
        return 0 if tensor.dtype.kind in "iub" else int((~np.isfinite(tensor)).sum())
    import torch

    if not tensor.is_floating_point():
        return 0
    if tensor.element_size() == 1:  # torch.isfinite does not take 8-bit floats
        tensor = tensor.half()
    return 0 if bool(torch.isfinite(tensor).all()) else int((~torch.isfinite(tensor)).sum())


def to_safetensors(tensors: dict[str, AnyTensor]) -> bytes:
    """Packs tensors and arrays from `on_host` into a safetensors file."""
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save as save_arrays

        arrays: bytes = save_arrays(tensors)
        return arrays
    import torch
    from safetensors.torch import save

    # safetensors refuses tensors that share memory with each other.
    apart, storages = {}, set[int]()
    for name, value in tensors.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    packed: bytes = save(apart)
    return packed
