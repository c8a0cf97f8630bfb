"""Versions and files of LoRA adapters."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import SupportsIndex, TypeAlias

SMALL_BYTES = 2**22
"""Of messages: a larger one keeps the event loops of both sides for longer than other calls should wait."""


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

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Lets a channel send the weights as they are, without copies of them in the pickle."""
        if int(protocol) < 5:
            return _unpickled, (self.config, self.weights)
        return _unpickled, (self.config, pickle.PickleBuffer(self.weights))

    def is_small(self, receivers: int = 1) -> bool:
        """Returns whether they travel inside messages, one for each receiver. Larger ones go through Ray's object
        store, once for each node, which takes 15 ms more."""
        return len(self.weights) * receivers <= SMALL_BYTES

    def checksum(self) -> str:
        """Checksum of both files."""
        digest = hashlib.blake2b(self.config, digest_size=16)
        digest.update(self.weights)
        return digest.hexdigest()


def _unpickled(config: bytes, weights: bytes | memoryview) -> AdapterFiles:
    return AdapterFiles(config=config, weights=bytes(weights))


AdapterArgument: TypeAlias = AdapterFiles | list[Awaitable[AdapterFiles]]
"""Files of an adapter, or a list with one reference to them in Ray's object store: Ray does not fetch references inside
lists, so the files skip the processes that only pass them on."""


async def files_of(argument: AdapterArgument) -> AdapterFiles:
    """Returns the files that an argument is or refers to."""
    return await argument[0] if isinstance(argument, list) else argument
