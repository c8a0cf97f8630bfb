"""Files of this process in memory: vLLM's workers are handed paths."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from twinkle_serve.adapters import CONFIG, WEIGHTS
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.weights import Bucket

MEMORY = Path("/dev/shm")
PREFIX = "twinkle-serve-"


class MemoryDirectory:
    """A directory, in memory where the system has that, with one subdirectory an adapter version.

    Holds a lock for as long as the process lives, so that the next one can tell what a killed one left.
    """

    def __init__(self) -> None:
        root = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(root)
        self.root = root
        # Locked before it has the name that others sweep.
        new = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}", dir=root))
        self._lock = os.open(new / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._path = new.rename(root / new.name.removeprefix("new-"))

    def write(self, name: str, text: str) -> Path:
        """Writes a small file of its own; returns its path."""
        path = self._path / name
        path.write_text(text)
        return path

    def put(self, version: AdapterVersion, files: AdapterFiles) -> Path:
        """Writes a version's files; returns their directory."""
        directory = self._path / str(version.id)
        directory.mkdir(exist_ok=True)
        (directory / CONFIG).write_bytes(files.config)
        (directory / WEIGHTS).write_bytes(files.weights)
        return directory

    def drop(self, version: AdapterVersion) -> None:
        shutil.rmtree(self._path / str(version.id), ignore_errors=True)

    @contextlib.contextmanager
    def holding(self, bucket: Bucket) -> Iterator[Path]:
        """A file with some of the model's own weights, for as long as it is needed."""
        path = self._path / "weights.safetensors"
        try:
            path.write_bytes(bucket.data)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        os.close(self._lock)


def _sweep(root: Path) -> None:
    """Removes directories whose process is gone: nobody holds their lock."""
    for path in root.glob(f"{PREFIX}*"):
        # Another user's, or one that another process is just sweeping.
        with contextlib.suppress(OSError):
            lock = os.open(path / "lock", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
