"""A state directory: small manifests, and beside them the files of each version."""

from __future__ import annotations

import json
import logging
from typing import Any

from twinkle_serve.errors import ConfigError, StoreError

logger = logging.getLogger("ray.serve")


class Disk:
    """A directory, or any URL that fsspec knows. Paths are relative to it."""

    def __init__(self, state_dir: str) -> None:
        """
        Raises:
            ConfigError: it cannot be used.
        """
        import fsspec

        try:
            self._system, self.root = fsspec.core.url_to_fs(state_dir)
            self._system.makedirs(self.root, exist_ok=True)
        except Exception as error:  # of whatever stands behind the URL
            raise ConfigError(f"state_dir {state_dir!r} cannot be used: {type(error).__name__}: {error}") from error
        self._is_local = self._system.protocol in ("file", ("file", "local"))

    def read_manifest(self, name: str) -> Any:
        """What was written under a name; None if nothing was.

        Raises:
            ConfigError
        """
        path = f"{self.root}/{name}"
        try:
            return json.loads(self._system.cat_file(path)) if self._system.exists(path) else None
        except Exception as error:
            raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}") from error

    def write_manifest(self, name: str, manifest: dict[str, Any]) -> None:
        """Replaces a manifest. Raises StoreError."""
        self.write(name, json.dumps(manifest).encode())

    def read(self, name: str) -> bytes:
        """Raises StoreError."""
        path = f"{self.root}/{name}"
        try:
            data: bytes = self._system.cat_file(path)
        except Exception as error:
            raise StoreError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        return data

    def write(self, name: str, data: Any) -> None:
        """Writes bytes, whole or not at all: an object store does so by itself, a file system by renaming.

        Raises:
            StoreError
        """
        path = f"{self.root}/{name}"
        try:
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            if self._is_local:
                self._system.pipe_file(f"{path}.part", data)
                self._system.mv(f"{path}.part", path)
            else:
                self._system.pipe_file(path, bytes(data))
        except Exception as error:
            raise StoreError(
                f"{path} of {len(data)} bytes cannot be written: {type(error).__name__}: {error}. Make room there, or "
                "name another state_dir."
            ) from error

    def entries(self, directory: str) -> list[str]:
        """Names of what is in a directory; none if there is none."""
        path = f"{self.root}/{directory}"
        if not self._system.exists(path):
            return []
        return [entry.rstrip("/").rpartition("/")[2] for entry in self._system.ls(path, detail=False)]

    def remove(self, directory: str) -> None:
        """Removes a directory, as far as that is possible: what no manifest names harms nobody."""
        path = f"{self.root}/{directory}"
        try:
            self._system.rm(path, recursive=True)
        except Exception as error:
            logger.warning(f"{path} was not removed: {type(error).__name__}: {error}")
