"""Logs of the Ray clusters that run now, and what was appended to them since a test began."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

MAX_LINES = 60
"""Per file, the last ones."""
MAX_FILES = 8
"""Those written to last."""
PATTERNS = ("serve/*.log", "worker-*.out", "worker-*.err")

_directories: list[Path] = []
_sizes: dict[Path, int] = {}


@contextlib.contextmanager
def cluster_directory() -> Iterator[str]:
    """A temporary directory for one cluster, whose logs are watched until it is removed."""
    directory = Path(tempfile.mkdtemp(prefix="tst"))  # short: socket paths are limited
    _directories.append(directory)
    try:
        yield str(directory)
    finally:
        _directories.remove(directory)
        shutil.rmtree(directory, ignore_errors=True)


def mark() -> None:
    """Notes how long each log is now."""
    _sizes.clear()
    _sizes.update((path, _size(path)) for path in _logs())


def since_mark() -> str:
    """The end of each log that has grown since `mark`; "" if none has."""
    grown = [path for path in _logs() if _size(path) > _sizes.get(path, 0)]
    newest = sorted(grown, key=lambda path: path.stat().st_mtime)[-MAX_FILES:]
    return "\n".join(_tail(path, _sizes.get(path, 0)) for path in newest)


def _logs() -> list[Path]:
    sessions = [directory / part / "session_latest/logs" for directory in _directories for part in ("", "ray")]
    return [path for session in sessions for pattern in PATTERNS for path in session.glob(pattern)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # rotated
        return 0


def _tail(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join([f"== {path.name}, {len(lines)} lines", *lines[-MAX_LINES:]])
