"""Versions and files of LoRA adapters."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """One immutable load of an adapter. Two versions never share an id or a label, so no cache can mix them."""

    name: str
    """Name that callers use: an alias of its newest version."""
    version: int
    """1, 2, … for each load under the name."""
    id: int
    """Unique among the versions of all adapters, in [1, 2**31)."""
    rank: int
    """Largest rank of its modules."""
    checksum: str = ""
    """Checksum of its files."""
    weights: int | None = None
    """Number of the weights version with which the model's own tensors in it are compared, the current one when it was
    added; None if it has none."""

    @property
    def label(self) -> str:
        """`name@version`, recorded in samples."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """An adapter as peft saves it, in memory."""

    config: bytes
    """Content of adapter_config.json."""
    weights: bytes
    """Content of adapter_model.safetensors."""

    def checksum(self) -> str:
        """Checksum of both files."""
        digest = hashlib.blake2b(self.config, digest_size=16)
        digest.update(self.weights)
        return digest.hexdigest()
