"""Stores versions of adapters atomically, in memory or in a state directory. Free of Ray."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from twinkle_serve.adapter_description import describe_adapter
from twinkle_serve.adapters import CONFIG, WEIGHTS
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.weights import MAIN_TRACK
from twinkle_serve.errors import AdapterError, ConfigError, StoreError
from twinkle_serve.weights.disk import Disk
from twinkle_serve.weights.model import ModelWeights

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
"""Layout of the manifest; others are refused."""


@dataclass(slots=True)
class _Entry:
    version: AdapterVersion
    is_path: bool
    published: bool = False


class WeightStore:
    """Stores the versions that engines load.

    Guarantees:
        - A version is complete when `put` has returned, and absent before.
        - A new store on the same state directory has the same versions.
        - Files that differ from those that were put raise and are never returned.
        - No two versions share an id, even after crashes.

    Does not guarantee:
        - Persistence beyond this process without a state directory.
        - Anything if two stores use the same state directory.
    """

    def __init__(self, model_id: str, state_dir: str | None = None, weights_versions: int = 1) -> None:
        """
        Args:
            model_id: model of the service; a state directory belongs to one.
            state_dir: directory, or any URL that fsspec supports. None keeps everything in this process's memory.
            weights_versions: see `ModelWeights`.

        Raises:
            ConfigError: the state directory belongs to another model or cannot be used, or its manifest cannot be read.
        """
        self._model_id = model_id
        self._entries: dict[int, _Entry] = {}
        """Versions by id."""
        self._loads: dict[str, int] = {}
        """Number of versions so far of each name."""
        self._memory: dict[int, AdapterFiles] = {}
        """Files by id, without a state directory."""
        # Random without a state directory: engines may still hold versions of a previous store.
        self._next_id = random.randrange(1, 2**30)
        self._disk = None if state_dir is None else Disk(state_dir)
        if self._disk is not None:
            self._recover(self._disk)
        self.model = ModelWeights(self._disk, weights_versions)
        """The model's own weights."""

    def published(self) -> dict[str, list[AdapterVersion]]:
        """Returns the published versions by name, the newest last.

        Called by a router that starts. Unpublished versions of its predecessor are dropped, and so are those named by a
        path, whose files may have changed.
        """
        orphans = [entry.version for entry in self._entries.values() if entry.is_path or not entry.published]
        self.drop(orphans)
        by_name: dict[str, list[AdapterVersion]] = {}
        for entry in sorted(self._entries.values(), key=lambda entry: entry.version.version):
            by_name.setdefault(entry.version.name, []).append(entry.version)
        return by_name

    def put(self, name: str, files: AdapterFiles, *, is_path: bool = False, track: str = MAIN_TRACK) -> AdapterVersion:
        """Stores an adapter as the next version of a name. It is not published yet.

        Args:
            name: name of the adapter.
            files: the adapter.
            is_path: whether the name is a path, given by a call.
            track: tensors of the model itself in the files are compared with its current weights.

        Raises:
            AdapterError: invalid name, or the files are not a valid adapter.
            StoreError: the state directory cannot be written.
        """
        if not isinstance(name, str) or not name or ("@" in name and not is_path):
            raise AdapterError(f"adapter_name must be a non-empty string without '@', got {name!r}.")
        description = describe_adapter(files)
        version = AdapterVersion(
            name=name,
            version=self._loads.get(name, 0) + 1,
            id=self._next_id,
            rank=description.rank,
            checksum=files.checksum(),
            weights=self.model.current(track).number if description.base else None,
        )
        if self._disk is not None:
            self._disk.write(f"{_directory(version)}/{CONFIG}", files.config)
            self._disk.write(f"{_directory(version)}/{WEIGHTS}", files.weights)
        else:
            self._memory[version.id] = files
        self._loads[name] = version.version
        self._next_id += 1
        self._entries[version.id] = _Entry(version, is_path)
        try:
            self._save()
        except BaseException:
            del self._entries[version.id]
            raise
        return version

    def publish(self, version: AdapterVersion) -> None:
        """Records that calls can use a version by its name: `published` returns it from now on.

        Raises:
            StoreError: the version was dropped, or the state directory cannot be written.
        """
        entry = self._entry(version)
        before, entry.published = entry.published, True
        try:
            self._save()
        except BaseException:
            entry.published = before
            raise

    def withdraw(self, name: str) -> None:
        """Records that a name is no longer in use; its versions stay until they are dropped.

        Raises:
            StoreError: the state directory cannot be written.
        """
        withdrawn = [e for e in self._entries.values() if e.version.name == name and e.published]
        for entry in withdrawn:
            entry.published = False
        try:
            self._save()
        except BaseException:
            for entry in withdrawn:
                entry.published = True
            raise

    def drop(self, versions: Sequence[AdapterVersion]) -> None:
        """Removes versions; unknown ones are ignored.

        Raises:
            StoreError: the state directory cannot be written.
        """
        dropped = [version for version in versions if self._entries.pop(version.id, None) is not None]
        if not dropped:
            return
        self._save()  # first: files that no manifest lists do no harm
        for version in dropped:
            self._memory.pop(version.id, None)
            if self._disk is not None:
                self._disk.remove(_directory(version))

    def files(self, version: AdapterVersion) -> AdapterFiles:
        """Returns the files of a version.

        Raises:
            StoreError: the version was dropped, or its files differ from those that were put.
        """
        self._entry(version)
        if self._disk is None:
            return self._memory[version.id]
        files = AdapterFiles(
            config=self._disk.read(f"{_directory(version)}/{CONFIG}"),
            weights=self._disk.read(f"{_directory(version)}/{WEIGHTS}"),
        )
        if (checksum := files.checksum()) != version.checksum:
            raise StoreError(
                f"adapter {version.label} in {self._disk.root} has the checksum {checksum}, and had {version.checksum} "
                "when it was added: its files were changed or truncated. Add it again."
            )
        return files

    def _entry(self, version: AdapterVersion) -> _Entry:
        if version.id not in self._entries:
            raise StoreError(f"the store no longer has adapter {version.label}. Add it again.")
        return self._entries[version.id]

    def _save(self) -> None:
        if self._disk is None:
            return
        self._disk.write_manifest(
            MANIFEST,
            {
                "format": FORMAT,
                "model_id": self._model_id,
                "next_id": self._next_id,
                "loads": self._loads,
                "versions": [
                    {**asdict(entry.version), "is_path": entry.is_path, "published": entry.published}
                    for entry in self._entries.values()
                ],
            },
        )

    def _recover(self, disk: Disk) -> None:
        manifest = disk.read_manifest(MANIFEST)
        if manifest is None:
            self._save()
            return
        try:
            if manifest["format"] != FORMAT:
                raise ConfigError(
                    f"state_dir {disk.root} has a manifest of format {manifest['format']}, this is format {FORMAT}. "
                    "Name another state_dir."
                )
            if manifest["model_id"] != self._model_id:
                raise ConfigError(
                    f"state_dir {disk.root} belongs to model_id {manifest['model_id']!r}, this service has "
                    f"{self._model_id!r}. Name another state_dir."
                )
            self._next_id, self._loads = int(manifest["next_id"]), dict(manifest["loads"])
            for item in manifest["versions"]:
                is_path, published = item.pop("is_path"), item.pop("published")
                version = AdapterVersion(**item)
                self._entries[version.id] = _Entry(version, is_path, published)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{disk.root}/{MANIFEST} cannot be read: {type(error).__name__}: {error}. Move it away to start over."
            ) from error
        logger.info(f"{len(self._entries)} versions of adapters found in {disk.root}")


def _directory(version: AdapterVersion) -> str:
    return f"adapters/{version.id}"
