"""Sums by which tensors are compared, made where they are."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

ROW = 1024
"""Words of a row."""


def tensor_sums(tensor: Tensor) -> list[Tensor]:
    """Returns sums that change when a bit of a tensor changes, or parts of it change places.

    The tensor's bytes are rows of ROW words of 64 bits, whose sums along either side wrap around.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // (8 * ROW) * (8 * ROW)
    sums = [data[whole:]]
    if whole:
        rows = data[:whole].view(torch.int64).view(-1, ROW)
        sums += [rows.sum(0), rows.sum(1)]
    return sums


def weight_digest(shape: tuple[int, ...], dtype: str, data: Tensor) -> str:
    """Returns a digest of a weight.

    Args:
        dtype: safetensors' name.
        data: the weight, or its bytes.
    """
    digest = hashlib.blake2b(f"{shape} {dtype}\n".encode(), digest_size=16)
    for sums in tensor_sums(data.detach()):
        digest.update(sums.cpu().numpy())
    return digest.hexdigest()
