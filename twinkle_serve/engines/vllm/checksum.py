"""A checksum of the tensors that a model computes with, made where they are."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.model_loader.weight_checksum import _weights

if TYPE_CHECKING:
    from torch import Tensor, nn

ROW = 1024
"""Words of a row."""


def model_checksum(model: nn.Module) -> str:
    """Returns a checksum of the names, shapes, dtypes and values of a model's parameters.

    vLLM's own (0.32) copies each tensor to the host and hashes it by SHA-256, 1.5 GB/s, while samples wait.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_weights(model), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for sums in tensor_sums(tensor.detach()):
            digest.update(sums.cpu().numpy())
    return digest.hexdigest()


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
