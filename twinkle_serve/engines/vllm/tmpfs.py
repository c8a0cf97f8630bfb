"""In-memory files of this process, for vLLM's workers, which take paths."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from twinkle_serve.adapters import CONFIG, WEIGHTS
from twinkle_serve.checkpoint import weight_files
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.parent import hold

MEMORY = Path("/dev/shm")
PREFIX = "twinkle-serve-"
OWNER = "owner"
"""File that the process with the engine holds; its name in the directory."""


class MemoryDirectory:
    """A directory on tmpfs where the system has one, with a subdirectory for each adapter version.

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
        self._path = new.rename(root / new.name.removeprefix("new-"))
        self._buckets = 0
        # A lock of another kind: forks of this process hold the first one too.
        self._held = hold(self.owner)

    @property
    def owner(self) -> Path:
        """File that this process holds, see `end_with_holder`."""
        return self._path / OWNER

    def write(self, name: str, text: str) -> Path:
        """Writes a small file and returns its path."""
        path = self._path / name
        path.write_text(text)
        return path

    def put(self, version: AdapterVersion, files: AdapterFiles) -> Path:
        """Writes the files of an adapter version and returns their directory."""
        directory = self._path / str(version.id)
        directory.mkdir(exist_ok=True)
        (directory / CONFIG).write_bytes(files.config)
        (directory / WEIGHTS).write_bytes(files.weights)
        return directory

    def drop(self, version: AdapterVersion) -> None:
        shutil.rmtree(self._path / str(version.id), ignore_errors=True)

    def write_bucket(self, bucket: Bucket) -> Path:
        """Writes a bucket of the model's own weights to a new file. Returns its path."""
        self._buckets += 1
        path = self._path / f"bucket-{self._buckets}.safetensors"
        path.write_bytes(bucket.data)
        return path

    def drop_buckets(self) -> None:
        """Removes the files of buckets that are left."""
        for path in self._path.glob("bucket-*.safetensors"):
            path.unlink(missing_ok=True)

    def own_weights(self, model: str) -> str:
        """Returns a model's directory, or one of links to its files if it has weights that are not the model's.

        vLLM (0.32) loads every safetensors file that no index leaves out, and prefers `consolidated*.safetensors`:
        those are left to models in Mistral's own format.
        """
        path = Path(model)
        strangers = set(path.glob("*.safetensors")) - set(weight_files(path))
        if not strangers or (path / "params.json").exists():
            return model
        links = self._path / "model"
        links.mkdir()
        for file in set(path.iterdir()) - strangers:
            (links / file.name).symlink_to(file.absolute())
        return str(links)

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        os.close(self._held)
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
