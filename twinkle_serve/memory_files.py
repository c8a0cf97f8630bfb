"""Files in memory, for other processes of the node."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Self

MEMORY = Path("/dev/shm")
PREFIX = "twinkle-serve-"


class MemoryDirectory:
    """A directory on tmpfs where the system has one.

    Holds a file lock while the process lives, so that later processes can remove the directories of killed ones.
    """

    def __init__(self) -> None:
        root = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(root)
        self.root = root
        # Locked before it gets the name that other processes sweep.
        new = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}", dir=root))
        self._lock = os.open(new / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = new.rename(root / new.name.removeprefix("new-"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the directory. Processes that have mapped a file keep its memory."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(root: Path) -> None:
    """Removes directories of dead processes, whose locks are free."""
    for path in root.glob(f"{PREFIX}*"):
        # Locked by its owner, another user's, or being swept by another process.
        with contextlib.suppress(OSError):
            lock = os.open(path / "lock", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
