"""Reads files ahead of their reader."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

PART_BYTES = 2**26
PARTS_AHEAD = 8
READERS = 4
MADV_POPULATE_READ = 22
"""Of Linux 5.14: reads the pages of a mapping."""


class ReadAhead:
    """Brings the parts of files into the system's cache, several at a time and in order.

    One reader that maps a file waits for each page in turn, which storage over a network serves at a fraction of its
    rate.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """
        Args:
            files: in the order in which they are used.
        """
        self._parts = _parts(files)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read ahead")
        self._used_bytes = 0
        self._begun = 0

    def __enter__(self) -> Self:
        self.used(0)
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def used(self, size: int) -> None:
        """Goes on after the next `size` bytes have been used."""
        self._used_bytes += size
        while self._begun < self._used_bytes // PART_BYTES + PARTS_AHEAD and (part := next(self._parts, None)):
            self._begun += 1
            self._pool.submit(_read, *part)


def _parts(files: Sequence[Path]) -> Iterator[tuple[Path, int, int]]:
    """Yields file, first byte and number of bytes of each part."""
    for file in files:
        size = file.stat().st_size
        for begin in range(0, size, PART_BYTES):
            yield file, begin, min(PART_BYTES, size - begin)


def _read(file: Path, begin: int, size: int) -> None:
    # What cannot be read ahead is read when it is used, and raises there.
    with (
        contextlib.suppress(OSError, ValueError),
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ, offset=begin) as mapped,
    ):
        mapped.madvise(MADV_POPULATE_READ)
