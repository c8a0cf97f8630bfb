"""A state directory that a test slows down, fills, or has killed."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from twinkle_serve.errors import StoreError
from twinkle_serve.weights.disk import Disk


class SlowDisk(Disk):
    """Writes the buckets of weights when a test lets it."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path
        self.go = threading.Event()
        self.go.set()
        self.is_full = False

    def write(self, name: str, data: bytes | memoryview) -> None:
        if name.endswith(".safetensors"):
            assert self.go.wait(60)
            if self.is_full:
                raise StoreError(f"{name} cannot be written: no space left on device")
        super().write(name, data)

    def as_after_a_kill(self) -> Disk:
        """Returns a disk with a copy of the files."""
        path = self.path.with_name(f"{self.path.name}-killed")
        shutil.copytree(self.path, path)
        return Disk(str(path))
