"""Buckets of weights as the blocks that changed since an earlier bucket."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import blake3
import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.errors import StoreError, WeightsError
from twinkle_serve.tensors import AnyTensor, TensorFile, encode_header, memory_of

BLOCK_BYTES = 2**16
DIGEST_BYTES = 16
PATCH_OF = "patch_of"
"""Key of the metadata of a patch: checksum of the bucket that it changes."""


@dataclass(frozen=True, slots=True)
class BucketDigests:
    """Hashes of a bucket."""

    header: bytes
    """The start of the safetensors file, before the tensors."""
    blocks: NDArray[np.uint8]
    """Hash of each block of the tensors; the last block may be shorter. Shape [blocks, DIGEST_BYTES]."""

    @classmethod
    def of(cls, bucket: Bucket | bytes) -> BucketDigests:
        """Hashes any bytes; those that are no safetensors file are split somewhere."""
        data = np.frombuffer(bucket, np.uint8).data
        start = min(8 + int.from_bytes(data[:8], "little"), len(data))
        return cls(bytes(data[:start]), _hash_blocks(data[start:]))

    @property
    def checksum(self) -> str:
        """Of the whole bucket."""
        return str(blake3.blake3(self.header + self.blocks.tobytes()).hexdigest(length=DIGEST_BYTES))


def _hash_blocks(data: memoryview) -> NDArray[np.uint8]:
    digests = b"".join(
        blake3.blake3(data[begin : begin + BLOCK_BYTES]).digest(length=DIGEST_BYTES)
        for begin in range(0, len(data), BLOCK_BYTES)
    )
    return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)


class PatchFile(TensorFile):
    """A bucket of which only the blocks are kept that differ from those of an earlier bucket."""

    def __init__(self, base: BucketDigests) -> None:
        """
        Args:
            base: the earlier bucket.
        """
        super().__init__(0)
        self._base = base
        self._digests: list[NDArray[np.uint8]] = []
        self._begun = np.empty(0, np.uint8)
        """Bytes of a block that the next tensor continues."""
        self._hashed = 0
        """Number of blocks."""
        self._changed: list[int] = []
        self._kept: list[NDArray[np.uint8]] = []
        """Bytes of the changed blocks."""
        self.digests: BucketDigests
        """Of the whole bucket, once it is finished."""

    def _append(self, tensor: AnyTensor) -> None:
        data = memory_of(tensor)
        if len(self._begun):
            missing = BLOCK_BYTES - len(self._begun)
            self._begun = np.concatenate([self._begun, data[:missing]])
            data = data[missing:]
            if len(self._begun) < BLOCK_BYTES:
                return
            self._take(self._begun)
        whole = len(data) - len(data) % BLOCK_BYTES
        self._take(data[:whole])
        self._begun = data[whole:].copy()

    def _take(self, data: NDArray[np.uint8]) -> None:
        """Hashes the next blocks, and keeps copies of those that changed."""
        digests = _hash_blocks(data.data)
        first, self._hashed = self._hashed, self._hashed + len(digests)
        before = self._base.blocks[first : self._hashed]
        differs = np.ones(len(digests), bool)
        differs[: len(before)] = (digests[: len(before)] != before).any(axis=1)
        for block in np.flatnonzero(differs).tolist():
            self._changed.append(first + block)
            self._kept.append(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES].copy())
        self._digests.append(digests)

    def finish(self, metadata: object = None) -> NDArray[np.uint8]:
        """Returns the patch, as a safetensors file of its own."""
        self._take(self._begun)
        header = encode_header(self._header)
        self.digests = BucketDigests(header, np.concatenate(self._digests))
        patch = TensorFile(sum(map(len, self._kept)))
        patch.add("blocks", np.array(self._changed, np.int64))
        patch.add("header", np.frombuffer(header, np.uint8))
        patch.add("data", np.concatenate([*self._kept, np.empty(0, np.uint8)]))
        return patch.finish({PATCH_OF: self._base.checksum, "checksum": self.digests.checksum, "size": str(self.size)})


def patched_bucket(bucket: Bucket) -> str | None:
    """Returns the checksum of the bucket that a patch changes; None if it is a whole bucket, or damaged."""
    try:
        end = 8 + int.from_bytes(bucket[:8].tobytes(), "little")
        return str(json.loads(bucket[8:end].tobytes())["__metadata__"][PATCH_OF])
    except (ValueError, KeyError, TypeError):
        return None


def apply_patch(patch: Bucket, read: Callable[[str], Bucket]) -> tuple[Bucket, str]:
    """Returns the bucket that a patch makes, and its checksum. One that has not changed is returned as it was read.

    Args:
        read: returns an earlier bucket by its checksum.

    Raises:
        WeightsError: the patch is damaged.
        StoreError: the result is not the bucket that the patch was made from.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        end = 8 + int.from_bytes(patch[:8].tobytes(), "little")
        metadata = json.loads(patch[8:end].tobytes())["__metadata__"]
        base_checksum, checksum, size = metadata[PATCH_OF], metadata["checksum"], int(metadata["size"])
        parts = load(patch.tobytes())
        header, blocks, data = parts["header"], parts["blocks"], parts["data"]
        whole = len(header) + size
        begins = blocks * BLOCK_BYTES
        if size < 0 or (begins < 0).any() or (begins >= size).any():
            raise ValueError(f"it has blocks outside of {size} bytes")
        if (expected := int(np.minimum(size - begins, BLOCK_BYTES).sum())) != len(data):
            raise ValueError(f"it has {len(data)} bytes of {expected}")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(f"a patch of weights is cut off or damaged: {type(error).__name__}: {error}") from None
    base = read(base_checksum)
    if checksum == base_checksum:
        return base, checksum
    start = min(8 + int.from_bytes(base[:8].tobytes(), "little"), len(base))
    made = np.empty(whole, np.uint8)
    made[: len(header)] = header
    tensors = made[len(header) :]
    tensors[: len(base) - start] = base[start : start + size]
    at = 0
    for begin in begins.tolist():
        length = min(BLOCK_BYTES, size - begin)
        tensors[begin : begin + length] = data[at : at + length]
        at += length
    if (found := BucketDigests.of(made).checksum) != checksum:
        raise StoreError(
            f"a patch of bucket {base_checksum} makes one with the checksum {found}, and the trainer's has {checksum}: "
            "the bucket was changed. Send the weights without delta=True."
        )
    return made, checksum
