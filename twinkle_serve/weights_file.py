"""A model's weights as one safetensors file that is sent and read piece by piece. Free of torch."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.weights import Bucket, WeightSpec
from twinkle_serve.errors import WeightsError
from twinkle_serve.packing import BUCKET_BYTES
from twinkle_serve.tensors import BITS, encode_header, nonfinite_in

MAX_HEADER_BYTES = 100_000_000
"""safetensors refuses longer headers."""
PIECE_BYTES = 2**20


class _Entry(NamedTuple):
    """A weight in the file."""

    name: str
    spec: WeightSpec
    begin: int
    """Of its bytes, after the header."""
    end: int


def joined_files(paths: Sequence[Path]) -> tuple[int, Iterator[bytes]]:
    """Joins the safetensors files of a model to one.

    Returns:
        Its size in bytes, and its bytes in pieces.

    Raises:
        WeightsError: a file cannot be read, or two have a weight of the same name.
    """
    header: dict[str, dict[str, object]] = {}
    parts: list[tuple[Path, int, int]] = []
    size = 0
    for path in paths:
        start, entries = _read_file_header(path)
        for entry in entries:
            if entry.name in header:
                raise WeightsError(f"weight {entry.name!r} is in two of the files, {path.name} is the second.")
            offsets = [size + entry.begin, size + entry.end]
            header[entry.name] = {
                "dtype": entry.spec.dtype,
                "shape": list(entry.spec.shape),
                "data_offsets": offsets,
            }
        length = max((entry.end for entry in entries), default=0)
        parts.append((path, start, length))
        size += length
    encoded = encode_header(header)

    def pieces() -> Iterator[bytes]:
        yield encoded
        for path, start, length in parts:
            with path.open("rb") as file:
                file.seek(start)
                left = length
                while left:
                    piece = file.read(min(PIECE_BYTES, left))
                    if not piece:
                        raise WeightsError(f"{path} was cut off while it was sent.")
                    left -= len(piece)
                    yield piece

    return len(encoded) + size, pieces()


def _read_file_header(path: Path) -> tuple[int, list[_Entry]]:
    """Returns where the data of a file begins, and its weights."""
    try:
        with path.open("rb") as file:
            length = _header_length(file.read(8))
            return 8 + length, _parse_header(file.read(length))
    except (OSError, WeightsError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None


async def buckets_of(
    pieces: AsyncIterable[bytes],
    *,
    max_weight_bytes: int,
    bucket_bytes: int = BUCKET_BYTES,
    allow_nonfinite: bool = False,
) -> AsyncGenerator[Bucket, None]:
    """Reads a safetensors file piece by piece, and yields its weights in buckets of about `bucket_bytes`.

    Args:
        pieces: the bytes of the file.
        max_weight_bytes: of one weight; a bucket has at least one.

    Raises:
        WeightsError: it is damaged or cut off, has more bytes than its header says, or holds values that are not
            finite. Buckets before were yielded.
    """
    reader = _Reader(pieces)
    length = _header_length(await reader.read(8))
    entries = _parse_header(await reader.read(length))
    for entry in entries:
        if (size := entry.end - entry.begin) > max_weight_bytes:
            raise WeightsError(f"weight {entry.name!r} has {size} bytes; the limit of one is {max_weight_bytes}.")
    for group in _grouped(entries, bucket_bytes):
        start = group[0].begin
        header = encode_header(
            {
                entry.name: {
                    "dtype": entry.spec.dtype,
                    "shape": list(entry.spec.shape),
                    "data_offsets": [entry.begin - start, entry.end - start],
                }
                for entry in group
            }
        )
        bucket = np.empty(len(header) + group[-1].end - start, np.uint8)
        bucket[: len(header)] = np.frombuffer(header, np.uint8)
        await reader.read_into(bucket[len(header) :])
        if not allow_nonfinite:
            await asyncio.to_thread(_refuse_nonfinite, group, bucket[len(header) :])
        yield bucket
    if await reader.more():
        raise WeightsError("the file goes on after its last weight.")


def _grouped(entries: Sequence[_Entry], bucket_bytes: int) -> Iterator[list[_Entry]]:
    """Yields consecutive weights, each a multiple of its item's size away from the first one of its group."""
    group: list[_Entry] = []
    for entry in entries:
        item_bytes = max(1, BITS[entry.spec.dtype] // 8)
        if group and (entry.end - group[0].begin > bucket_bytes or (entry.begin - group[0].begin) % item_bytes):
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def _refuse_nonfinite(group: Sequence[_Entry], data: NDArray[np.uint8]) -> None:
    start = group[0].begin
    for entry in group:
        if bad := nonfinite_in(entry.spec.dtype, data[entry.begin - start : entry.end - start]):
            raise WeightsError(
                f"weight {entry.name!r} has {bad} values of {math.prod(entry.spec.shape)} that are not finite. Allow "
                "that with allow_nonfinite if it is intended."
            )


def _header_length(data: bytes) -> int:
    length = int.from_bytes(data, "little")
    if len(data) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise WeightsError("the weights are not a safetensors file.")
    return length


def _parse_header(data: bytes) -> list[_Entry]:
    """Returns the weights of a header in the order of their bytes, which leave no gap."""
    try:
        header: dict[str, Any] = json.loads(data)
        header.pop("__metadata__", None)
        entries = [
            _Entry(name, WeightSpec(tuple(map(int, entry["shape"])), str(entry["dtype"])), *entry["data_offsets"])
            for name, entry in header.items()
        ]
        entries.sort(key=lambda entry: (entry.begin, entry.end))
        end = 0
        for entry in entries:
            bits = math.prod(entry.spec.shape) * BITS[entry.spec.dtype]
            if entry.begin != end or 8 * (entry.end - entry.begin) != bits or min(entry.spec.shape, default=0) < 0:
                raise ValueError(f"{entry.name} of shape {entry.spec.shape} is at {entry.begin} to {entry.end}")
            end = entry.end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"the header of the weights is damaged: {type(error).__name__}: {error}") from None
    return entries


class _Reader:
    """Reads exact numbers of bytes from pieces of any size."""

    def __init__(self, pieces: AsyncIterable[bytes]) -> None:
        self._pieces = aiter(pieces)
        self._rest = memoryview(b"")

    async def read(self, count: int) -> bytes:
        """Returns the next `count` bytes. Raises WeightsError if there are fewer."""
        parts: list[memoryview] = []
        while count:
            parts.append(part := await self._next(count))
            count -= len(part)
        return b"".join(parts)

    async def read_into(self, memory: NDArray[np.uint8]) -> None:
        """Fills memory with the next bytes. Raises as `read`."""
        filled = 0
        while filled < len(memory):
            part = await self._next(len(memory) - filled)
            memory[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
            filled += len(part)

    async def more(self) -> bool:
        """Whether another byte comes."""
        return bool(self._rest) or bool(await anext(self._pieces, b""))

    async def _next(self, most: int) -> memoryview:
        if not self._rest:
            piece = await anext(self._pieces, None)
            if piece is None:
                raise WeightsError("the weights end early: they are cut off, or not a safetensors file.")
            self._rest = memoryview(piece)
        part, self._rest = self._rest[:most], self._rest[most:]
        return part
