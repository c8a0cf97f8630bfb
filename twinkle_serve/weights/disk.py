"""A state directory: small manifests and the files of each version."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.errors import ConfigError, StoreError

logger = logging.getLogger(__name__)

Json: TypeAlias = Any
"""Content of a JSON file, not validated."""


OWNER = "owner.json"
"""Names the store that writes, where files cannot be locked."""


class Disk:
    """A directory, or any URL that fsspec supports. Paths are relative to it.

    Guarantees:
        Of two stores on one URL, the earlier one raises instead of writing a manifest. `StateLock` locks local
            directories.
    """

    def __init__(self, state_dir: str) -> None:
        """
        Raises:
            ConfigError: the directory cannot be created or reached.
        """
        import fsspec

        try:
            self._system, self.root = fsspec.core.url_to_fs(state_dir)
            self._system.makedirs(self.root, exist_ok=True)
        except Exception as error:  # the URL's file system may raise anything
            raise ConfigError(f"state_dir {state_dir!r} cannot be used: {type(error).__name__}: {error}") from error
        self.is_local = _is_local(self._system)
        self._owner = {"id": uuid.uuid4().hex, "pid": os.getpid(), "host": socket.gethostname()}
        if not self.is_local:
            self.write(OWNER, json.dumps(self._owner).encode())

    def read_manifest(self, name: str) -> Json:
        """Reads a manifest; None if there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        path = f"{self.root}/{name}"
        try:
            return json.loads(self._system.cat_file(path)) if self._system.exists(path) else None
        except Exception as error:
            raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}") from error

    def write_manifest(self, name: str, manifest: Mapping[str, object]) -> None:
        """Replaces a manifest.

        Raises:
            StoreError: it cannot be written, or another store has been started on the same URL.
        """
        if not self.is_local and (owner := self.read_manifest(OWNER)) not in (None, self._owner):
            raise StoreError(
                f"{self.root} is in use by pid {owner['pid']} on {owner['host']}, which started after this service, "
                "and one service at a time can use a state_dir. End one of them, or name another state_dir."
            )
        self.write(name, json.dumps(manifest).encode())

    def read(self, name: str) -> bytes:
        """Reads a file.

        Raises:
            StoreError: it cannot be read.
        """
        path = f"{self.root}/{name}"
        try:
            data: bytes = self._system.cat_file(path)
        except Exception as error:
            raise StoreError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        return data

    def map(self, name: str) -> Bucket:
        """Returns a file, without reading it where it is local.

        Raises:
            StoreError: it cannot be read.
        """
        if not self.is_local:
            return np.frombuffer(self.read(name), np.uint8)
        path = f"{self.root}/{name}"
        try:
            return np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {type(error).__name__}: {error}") from error

    def write_changed(
        self, name: str, source: str, begin: int, to: int, size: int, pieces: Iterable[tuple[int, Bucket]]
    ) -> Bucket:
        """Writes a file as a copy of another one with some changes, in the kernel where that is possible. Local only.

        Args:
            begin: index in the other file of the first byte that is copied,
            to: and where that comes to be.
            size: of the new file, bytes.
            pieces: the changes: index in the new file, and bytes.

        Raises:
            StoreError: it cannot be written.
        """
        path = Path(self.root) / name
        try:
            with (Path(self.root) / source).open("rb") as old, path.open("w+b") as new:
                left = min(os.fstat(old.fileno()).st_size - begin, size - to)
                while left > 0:
                    done = os.copy_file_range(old.fileno(), new.fileno(), left, begin, to)
                    if not done:
                        break
                    begin, to, left = begin + done, to + done, left - done
                os.ftruncate(new.fileno(), size)
                for at, piece in pieces:
                    os.pwrite(new.fileno(), piece.data, at)
            return np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise self._unwritable(str(path), size, error) from error

    def rename(self, name: str, to: str) -> None:
        """Renames a file. Local only. Raises StoreError where that fails."""
        try:
            (Path(self.root) / name).replace(Path(self.root) / to)
        except OSError as error:
            raise StoreError(f"{self.root}/{to} cannot be written: {type(error).__name__}: {error}") from error

    def require_room(self, size: int) -> None:
        """Raises StoreError where so many bytes do not fit, as far as that is known."""
        if self.is_local and (free := shutil.disk_usage(self.root).free) < size:
            raise StoreError(
                f"{size} bytes do not fit into {self.root}, {free} are free. Make room there, or name "
                "another state_dir."
            )

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes bytes atomically: an object store does so by itself, a file system by renaming.

        Raises:
            StoreError: they cannot be written.
        """
        path = f"{self.root}/{name}"
        try:
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            if self.is_local:
                self._system.pipe_file(f"{path}.part", data)
                self._system.mv(f"{path}.part", path)
            else:
                self._system.pipe_file(path, bytes(data))
        except Exception as error:
            raise self._unwritable(path, len(data), error) from error

    def _unwritable(self, path: str, size: int, error: Exception) -> StoreError:
        return StoreError(
            f"{path} of {size} bytes cannot be written: {type(error).__name__}: {error}. Make room there, or name "
            "another state_dir."
        )

    def entries(self, directory: str) -> list[str]:
        """Names of the entries of a directory; empty if it does not exist."""
        path = f"{self.root}/{directory}"
        if not self._system.exists(path):
            return []
        return [entry.rstrip("/").rpartition("/")[2] for entry in self._system.ls(path, detail=False)]

    def remove(self, name: str) -> None:
        """Removes a file or directory, if there is one. A failure is logged only: files that no manifest lists do no
        harm."""
        path = f"{self.root}/{name}"
        try:
            self._system.rm(path, recursive=True)
        except FileNotFoundError:
            pass
        except Exception as error:
            logger.warning(f"{path} was not removed: {type(error).__name__}: {error}")


def local_path(state_dir: str) -> Path | None:
    """Returns the directory that a state_dir names; None for another file system's URL.

    Raises:
        ConfigError: no such file system.
    """
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(state_dir)
    except Exception as error:  # the URL's file system may raise anything
        raise ConfigError(f"state_dir {state_dir!r} cannot be used: {type(error).__name__}: {error}") from error
    return Path(root) if _is_local(system) else None


def _is_local(system: Any) -> bool:
    return system.protocol in ("file", ("file", "local"))
