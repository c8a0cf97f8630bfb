"""torch's tensors and numpy's arrays as safetensors files. torch is imported only where a tensor of its own comes."""

from __future__ import annotations

from typing import Any

import numpy as np


def gathered(tensor: Any) -> Any:
    """The whole tensor, detached and on its device; a numpy array of what is not torch's.

    A sharded tensor (DTensor) is gathered, in which every rank of its mesh has to take part.
    """
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach() if hasattr(whole, "detach") else np.asarray(whole)


def on_host(tensor: Any) -> Any:
    """A gathered tensor or array, contiguous and in host memory."""
    return np.asarray(tensor, order="C") if isinstance(tensor, np.ndarray) else tensor.cpu().contiguous()


def count_nonfinite(tensor: Any) -> int:
    """How many values of a gathered tensor or array are NaN or infinite."""
    if isinstance(tensor, np.ndarray):
        return 0 if tensor.dtype.kind in "iub" else int((~np.isfinite(tensor)).sum())
    import torch

    if not tensor.is_floating_point():
        return 0
    if tensor.element_size() == 1:  # torch asks this of no 8-bit float
        tensor = tensor.half()
    return 0 if bool(torch.isfinite(tensor).all()) else int((~torch.isfinite(tensor)).sum())


def to_safetensors(tensors: dict[str, Any]) -> bytes:
    """A safetensors file of tensors and arrays that `on_host` returned."""
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save as save_arrays

        arrays: bytes = save_arrays(tensors)
        return arrays
    import torch
    from safetensors.torch import save

    # Tensors that share memory with each other cannot be saved side by side.
    apart, storages = {}, set[int]()
    for name, value in tensors.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    packed: bytes = save(apart)
    return packed
