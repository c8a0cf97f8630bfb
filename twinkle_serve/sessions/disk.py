"""Sessions in a local directory: a file of records for each, and a list of those that have ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinkle_serve.errors import ConfigError, StoreError

logger = logging.getLogger(__name__)

FORMAT = 1
"""Layout of the files; others are refused."""
FRAME = struct.Struct("<II")
"""Before each record: its size and its CRC."""
SUFFIX = ".turns"
ENDED = "ended.jsonl"


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session's file as a new store finds it."""

    session: str
    created: float
    used: float
    """When the session was last used, seconds since 1970: the time of the file."""
    size: int
    """Bytes."""


class SessionDisk:
    """The files of sessions.

    Guarantees:
        - A record that `append` has written is there for the next process, whenever this one ends.
        - Of a record that was not written completely, nothing is left.

    Does not guarantee:
        - That a record outlives the machine: the system writes it to the device when it sees fit.
    """

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ConfigError: the directory cannot be used.
        """
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the directory of sessions {directory} cannot be used: {type(error).__name__}: {error}"
            ) from error

    def sessions(self) -> list[StoredSession]:
        """Returns the sessions that are there, the least recently used one first. Removes files that are none.

        Raises:
            ConfigError: a file has the layout of another version.
        """
        found = [stored for path in self._directory.glob(f"*{SUFFIX}") if (stored := self._stored(path)) is not None]
        return sorted(found, key=lambda stored: stored.used)

    def create(self, session: str, created: float, record: bytes) -> int:
        """Makes the file of a new session, with its first record. Returns its size, bytes.

        Raises:
            StoreError: it cannot be written.
        """
        self.remove(session)  # of an ended session, whose file could not be removed
        head = json.dumps({"format": FORMAT, "session": session, "created": created}).encode()
        return self._append(session, _framed(head) + _framed(record), 0)

    def append(self, session: str, record: bytes, size: int) -> int:
        """Appends a record to a file of `size` bytes. Returns its new size.

        Raises:
            StoreError: it cannot be written; the file is as it was.
        """
        return self._append(session, _framed(record), size)

    def _append(self, session: str, data: bytes, size: int) -> int:
        path = self._path(session)
        try:
            with path.open("ab") as file:
                try:
                    file.write(data)
                    file.flush()
                except OSError:
                    os.truncate(path, size)
                    raise
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written: {type(error).__name__}: {error}. Make room there, lower "
                "sessions.disk_bytes, or name another state_dir."
            ) from error
        return size + len(data)

    def read(self, session: str) -> list[bytes]:
        """Returns the records of a session. What follows the last complete one is removed from the file.

        Raises:
            StoreError: the file cannot be read.
        """
        path = self._path(session)
        try:
            data = path.read_bytes()
            records = list(_records(data))
            size = sum(FRAME.size + len(record) for record in records)
            if size < len(data):
                logger.warning(f"{path} is damaged after {size} bytes: the {len(data) - size} bytes there are removed")
                os.truncate(path, size)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        return records[1:]

    def size(self, session: str) -> int:
        """Returns the size of a session's file, bytes."""
        return self._path(session).stat().st_size

    def touch(self, session: str, used: float) -> None:
        """Notes when a session was last used."""
        with contextlib.suppress(OSError):
            os.utime(self._path(session), (used, used))

    def remove(self, session: str) -> None:
        """Removes the file of a session. A failure is logged only: the session is in the list of ended ones."""
        path = self._path(session)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"{path} was not removed: {type(error).__name__}: {error}")

    # -- ended sessions --------------------------------------------------------------------------

    def ended(self) -> list[tuple[str, str]]:
        """Returns the sessions that have ended, and why, oldest first. An incomplete last line is left out."""
        try:
            lines = (self._directory / ENDED).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        entries = []
        for line in lines:
            with contextlib.suppress(ValueError):
                session, reason = json.loads(line)
                entries.append((str(session), str(reason)))
        return entries

    def add_ended(self, session: str, reason: str) -> None:
        """Adds to the list of ended sessions. A failure is logged only: other sessions must not fail with it."""
        try:
            with (self._directory / ENDED).open("ab") as file:
                # A line break first ends a line that was not written completely.
                file.write(b"\n" + json.dumps([session, reason]).encode())
        except OSError as error:
            logger.warning(f"the end of session {session!r} was not noted: {type(error).__name__}: {error}")

    def replace_ended(self, entries: Sequence[tuple[str, str]]) -> None:
        """Replaces the list of ended sessions. A failure is logged only."""
        path = self._directory / ENDED
        try:
            part = path.with_suffix(".part")
            part.write_bytes(b"".join(b"\n" + json.dumps(entry).encode() for entry in entries))
            part.replace(path)
        except OSError as error:
            logger.warning(f"{path} was not written: {type(error).__name__}: {error}")

    def _stored(self, path: Path) -> StoredSession | None:
        try:
            stat = path.stat()
            with path.open("rb") as file:
                head = file.read(FRAME.size)
                record = next(_records(head + file.read(FRAME.unpack(head)[0] if len(head) == FRAME.size else 0)), None)
        except OSError as error:
            logger.warning(f"{path} cannot be read: {type(error).__name__}: {error}")
            return None
        if record is None:  # its first turn was not acknowledged
            path.unlink(missing_ok=True)
            return None
        entry: dict[str, Any] = json.loads(record)
        if entry.get("format") != FORMAT:
            raise ConfigError(
                f"{path} has format {entry.get('format')}, this is format {FORMAT}. Move {self._directory} away, or "
                "name another state_dir."
            )
        return StoredSession(entry["session"], entry["created"], stat.st_mtime, stat.st_size)

    def _path(self, session: str) -> Path:
        return self._directory / (hashlib.blake2b(session.encode(), digest_size=16).hexdigest() + SUFFIX)


def record_size(record: bytes) -> int:
    """Returns the size of a record in a file, bytes."""
    return FRAME.size + len(record)


def _framed(record: bytes) -> bytes:
    return FRAME.pack(len(record), zlib.crc32(record)) + record


def _records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a file up to the first that is incomplete or damaged."""
    start = 0
    while start + FRAME.size <= len(data):
        size, checksum = FRAME.unpack_from(data, start)
        start += FRAME.size
        record = data[start : start + size]
        if len(record) < size or zlib.crc32(record) != checksum:
            return
        yield record
        start += size
