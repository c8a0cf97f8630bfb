"""Buckets of weights as the blocks that changed since an earlier bucket."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import blake3
import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.errors import StoreError, WeightsError
from twinkle_serve.tensors import AnyTensor, TensorFile, encode_header, memory_of

BLOCK_BYTES = 2**16
DIGEST_BYTES = 16
MAX_THREADS = 4
THREAD_BYTES = 2**24
"""Less is hashed by one thread."""
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
        data = np.frombuffer(bucket, np.uint8)
        start = tensors_begin(data)
        return cls(data[:start].tobytes(), _hash_blocks(data[start:].data))

    @property
    def checksum(self) -> str:
        """Of the whole bucket."""
        return str(blake3.blake3(self.header + self.blocks.tobytes()).hexdigest(length=DIGEST_BYTES))


def _hash_blocks(data: memoryview) -> NDArray[np.uint8]:
    """Returns the hash of each block. Shape [blocks, DIGEST_BYTES]. Takes several cores for much."""
    if len(data) < THREAD_BYTES:
        return _hash_in_turn(data)
    threads = min(len(os.sched_getaffinity(0)), MAX_THREADS)
    step = -(-len(data) // (threads * BLOCK_BYTES)) * BLOCK_BYTES
    with ThreadPoolExecutor(threads, thread_name_prefix="hashes") as pool:
        return np.concatenate(list(pool.map(_hash_in_turn, (data[i : i + step] for i in range(0, len(data), step)))))


def _hash_in_turn(data: memoryview) -> NDArray[np.uint8]:
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
        header = encode_header(self._header, size=len(self._base.header))  # of the same length where that is possible
        self.digests = BucketDigests(header, np.concatenate(self._digests))
        patch = TensorFile(sum(map(len, self._kept)))
        patch.add("blocks", np.array(self._changed, np.int64))
        patch.add("header", np.frombuffer(header, np.uint8))
        patch.add("data", np.concatenate([*self._kept, np.empty(0, np.uint8)]))
        return patch.finish({PATCH_OF: self._base.checksum, "checksum": self.digests.checksum, "size": str(self.size)})


def is_patch(bucket: Bucket) -> bool:
    """Whether a bucket says that it is a patch, be it damaged or not."""
    try:
        return PATCH_OF in _metadata(bucket)
    except (ValueError, KeyError, TypeError):
        return False


def _metadata(bucket: Bucket) -> dict[str, str]:
    end = 8 + int.from_bytes(bucket[:8].tobytes(), "little")
    return dict(json.loads(bucket[8:end].tobytes())["__metadata__"])


@dataclass(frozen=True, slots=True)
class Patch:
    """A patch that was read."""

    base: str
    """Checksum of the bucket that it changes."""
    checksum: str
    """Of the bucket that it makes."""
    header: NDArray[np.uint8]
    size: int
    """Of the bucket that it makes, bytes."""
    begins: list[int]
    """Index in the bucket of the first byte of each changed block."""
    data: NDArray[np.uint8]
    """The changed blocks."""

    @classmethod
    def read(cls, bucket: Bucket) -> Patch:
        """Reads what `PatchFile` has written.

        Raises:
            WeightsError: it is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            metadata, parts = _metadata(bucket), load(bucket.tobytes())
            header, data, size = parts["header"], parts["data"], int(metadata["size"])
            begins = parts["blocks"] * BLOCK_BYTES
            if size < 0 or (begins < 0).any() or (begins >= size).any():
                raise ValueError(f"it has blocks outside of {size} bytes")
            if (expected := int(np.minimum(size - begins, BLOCK_BYTES).sum())) != len(data):
                raise ValueError(f"it has {len(data)} bytes of {expected}")
            places = (begins + len(header)).tolist()
            return cls(metadata[PATCH_OF], metadata["checksum"], header, len(header) + size, places, data)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise WeightsError(f"a patch of weights is cut off or damaged: {type(error).__name__}: {error}") from None

    @property
    def pieces(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Index in the bucket, and bytes, of everything that is not as in its base."""
        yield 0, self.header
        at = 0
        for begin in self.begins:
            length = min(BLOCK_BYTES, self.size - begin)
            yield begin, self.data[at : at + length]
            at += length

    def apply(self, base: Bucket) -> Bucket:
        """Returns the bucket that it makes.

        Raises:
            StoreError: as `check`.
        """
        made = np.empty(self.size, np.uint8)
        tensors, kept = made[len(self.header) :], base[tensors_begin(base) :][: self.size - len(self.header)]
        tensors[: len(kept)] = kept
        for begin, piece in self.pieces:
            made[begin : begin + len(piece)] = piece
        self.check(made)
        return made

    def check(self, made: Bucket) -> None:
        """Raises StoreError for a bucket that is not the one that the trainer has made the patch of."""
        if (found := BucketDigests.of(made).checksum) != self.checksum:
            raise StoreError(
                f"a patch of bucket {self.base} makes one with the checksum {found}, and the trainer's has "
                f"{self.checksum}: the bucket was changed. Send the weights without delta=True."
            )


def tensors_begin(bucket: Bucket) -> int:
    """Index of the first byte behind the header."""
    return min(8 + int.from_bytes(bucket[:8].tobytes(), "little"), len(bucket))
