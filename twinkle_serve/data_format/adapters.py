"""LoRA adapters on their way to the engines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """One immutable load of an adapter. Two versions share neither id nor label, so no cache can mix them."""

    name: str
    """What callers call it: an alias of its newest version."""
    version: int
    """1, 2, … at each load under the name."""
    id: int
    """Number that no other version has, of this name or another, in [1, 2**31)."""
    rank: int
    """Largest rank of its modules."""
    checksum: str = ""
    """Of its files."""

    @property
    def label(self) -> str:
        """`name@version`, which samples are stamped with."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """An adapter as peft saves it, in memory."""

    config: bytes
    """adapter_config.json."""
    weights: bytes
    """adapter_model.safetensors."""

    def checksum(self) -> str:
        digest = hashlib.blake2b(self.config, digest_size=16)
        digest.update(self.weights)
        return digest.hexdigest()
