"""In-memory files of this process, for vLLM's workers, which take paths."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from twinkle_serve.adapters import CONFIG, WEIGHTS
from twinkle_serve.checkpoint import weight_files
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.memory_files import MemoryDirectory
from twinkle_serve.parent import hold

OWNER = "owner"
"""File that the process with the engine holds; its name in the directory."""


class EngineFiles(MemoryDirectory):
    """Files for the workers of an engine, with a subdirectory for each adapter version."""

    def __init__(self) -> None:
        super().__init__()
        self._buckets = 0
        # A lock of another kind: forks of this process hold the first one too.
        self._held = hold(self.owner)

    @property
    def owner(self) -> Path:
        """File that this process holds, see `end_with_holder`."""
        return self.path / OWNER

    def write(self, name: str, text: str) -> Path:
        """Writes a small file and returns its path."""
        path = self.path / name
        path.write_text(text)
        return path

    def put(self, version: AdapterVersion, files: AdapterFiles) -> Path:
        """Writes the files of an adapter version and returns their directory."""
        directory = self.path / str(version.id)
        directory.mkdir(exist_ok=True)
        (directory / CONFIG).write_bytes(files.config)
        (directory / WEIGHTS).write_bytes(files.weights)
        return directory

    def drop(self, version: AdapterVersion) -> None:
        shutil.rmtree(self.path / str(version.id), ignore_errors=True)

    def bucket_file(self, bucket: Bucket) -> Path:
        """Returns a file with a bucket of the model's own weights: that which it is mapped from, while that is there,
        or a new one."""
        if isinstance(bucket, np.memmap) and bucket.filename is not None and Path(bucket.filename).exists():
            return Path(bucket.filename)
        self._buckets += 1
        path = self.path / f"bucket-{self._buckets}.safetensors"
        path.write_bytes(bucket.data)
        return path

    def drop_bucket(self, path: Path) -> None:
        """Removes the file of a bucket if it was made for it."""
        if path.parent == self.path:
            path.unlink(missing_ok=True)

    def drop_buckets(self) -> None:
        """Removes the files of buckets that are left."""
        for path in self.path.glob("bucket-*.safetensors"):
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
        links = self.path / "model"
        links.mkdir()
        for file in set(path.iterdir()) - strangers:
            (links / file.name).symlink_to(file.absolute())
        return str(links)

    def close(self) -> None:
        super().close()
        os.close(self._held)
