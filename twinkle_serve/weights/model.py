"""The versions of the model's own weights: one is current, another may be on its way. No Ray here."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import blake3

from twinkle_serve.checkpoint import bucket_shapes
from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, Bucket, WeightsVersion
from twinkle_serve.errors import ConfigError, StoreError, WeightsError
from twinkle_serve.weights.disk import Disk

logger = logging.getLogger("ray.serve")

MANIFEST = "base.json"
FORMAT = 1


@dataclass(slots=True)
class _Upload:
    version: WeightsVersion
    expected: Mapping[str, tuple[int, ...]]
    """Shapes of the weights that must come, by name."""
    tied: frozenset[str]
    """Names that may come besides."""
    seen: set[str] = field(default_factory=set)


class ModelWeights:
    """Keeps what engines load as the model's own weights.

    Guarantees: a version is current when `commit` has returned, every byte of it; before, the one before it is.
    Guarantees: a store that is made anew on the same state directory has the current version, and no part of another.
    Guarantees: a bucket that is not the one that was appended is an error, and is handed to nobody.
    Guarantees: no label is used twice.
    Does not guarantee: anything beyond this process without a state directory.
    """

    def __init__(self, disk: Disk | None = None) -> None:
        """
        Args:
            disk: None keeps everything in this process alone.

        Raises:
            ConfigError: the manifest cannot be read.
        """
        self._disk = disk
        self._memory: dict[tuple[int, int], bytes] = {}
        """Buckets by version and index, where there is no state directory."""
        self._labels = [CHECKPOINT_VERSION.label]
        """Of all versions that have been current, by their number."""
        self._current = CHECKPOINT_VERSION
        self._upload: _Upload | None = None
        # At random: a call that was meant for a store before this one must not meet an upload of this one.
        self._uploads = random.getrandbits(40)
        self._sealed: WeightsVersion | None = None
        if disk is not None:
            self._recover(disk)

    def recover(self) -> tuple[WeightsVersion, list[str]]:
        """The current version, and the label of each version so far by its number.

        Called by a router that begins: what one before it had begun and not committed is dropped.
        """
        self._drop_pending()
        return self._current, list(self._labels)

    def current(self) -> WeightsVersion:
        return self._current

    def begin(self, label: str, expected: Mapping[str, tuple[int, ...]], tied: set[str]) -> int:
        """Begins a version, in place of one that was begun and not committed. Returns what its buckets are sent under.

        Args:
            expected: shape of every weight that it has to have, by name.
            tied: names that it may have besides.

        Raises:
            WeightsError: the label was used before.
        """
        if label in self._labels:
            raise WeightsError(
                f"version {label!r} exists already, it was number {self._labels.index(label)}; the current one is "
                f"{self._current.label!r}. Give each version a label of its own."
            )
        self._drop_pending()
        self._uploads += 1
        version = WeightsVersion(label=label, number=len(self._labels))
        self._upload = _Upload(version, expected, frozenset(tied))
        return self._uploads

    def append(self, upload: int, index: int, bucket: Bucket) -> None:
        """Keeps the next bucket of a version.

        Raises:
            WeightsError: it is damaged, or holds names or shapes that the model has not; nothing of the version is
                kept.
            StoreError: it is not the next one, or the state directory cannot be written.
        """
        pending = self._require(upload)
        version = pending.version
        checksum = _checksum(bucket.data)
        if index == len(version.buckets) - 1 and checksum == version.buckets[index]:
            return  # sent again, by a caller who had no answer
        if index != len(version.buckets):
            raise StoreError(f"bucket {index} of {version.label!r} came after {len(version.buckets)} buckets.")
        try:
            shapes = bucket_shapes(bucket)
            _check_shapes(shapes, pending)
        except WeightsError:
            self._drop_pending()
            raise
        if self._disk is None:
            self._memory[version.number, index] = bytes(bucket)
        else:
            self._disk.write(_path(version, index), bucket.data)
        pending.seen |= shapes.keys()
        pending.version = replace(
            version, buckets=(*version.buckets, checksum), size_bytes=version.size_bytes + len(bucket)
        )

    def seal(self, upload: int) -> WeightsVersion:
        """Ends the upload of a version; it is not current yet.

        Raises:
            WeightsError: weights of the model are missing; nothing of the version is kept.
        """
        if self._sealed is not None and upload == self._uploads:
            return self._sealed  # sent again
        pending = self._require(upload)
        if missing := sorted(pending.expected.keys() - pending.seen):
            self._drop_pending()
            raise WeightsError(
                f"version {pending.version.label!r} lacks {len(missing)} of the model's {len(pending.expected)} "
                f"weights, such as {', '.join(missing[:3])}. Send them all."
            )
        self._upload, self._sealed = None, pending.version
        return pending.version

    def commit(self, version: WeightsVersion) -> None:
        """Makes a sealed version the current one; the one before it goes.

        Raises:
            StoreError: it was dropped, or the state directory cannot be written; the current version stays.
        """
        if version == self._current:
            return  # sent again
        if version != self._sealed:
            raise StoreError(f"the store has no version {version.label!r} any more. Send it again.")
        before = self._current
        self._current = version
        self._labels.append(version.label)
        try:
            self._save()
        except BaseException:
            if not self._is_written(version):  # a write may fail after it has taken effect
                self._current = before
                self._labels.pop()
                raise
        self._sealed = None
        self._remove(before)

    def discard(self, upload: int) -> None:
        """Drops what was begun and not committed, if it is this upload."""
        if upload == self._uploads:
            self._drop_pending()

    def purge(self) -> None:
        """Makes the model's own files current, and every label free, as if nothing had been.

        Raises:
            StoreError: the state directory cannot be written; nothing has changed.
        """
        before, labels = self._current, self._labels
        self._current, self._labels = CHECKPOINT_VERSION, [CHECKPOINT_VERSION.label]
        try:
            self._save()
        except BaseException:
            self._current, self._labels = before, labels
            raise
        self._remove(before)
        self._drop_pending()

    def bucket(self, version: WeightsVersion, index: int) -> bytes:
        """A bucket of the current version, or of the one that is to be current.

        Raises:
            StoreError: the version was dropped, or the bucket is not the one that was appended.
        """
        if version not in (self._current, self._sealed):
            current = self._current.label
            raise StoreError(f"the store has no version {version.label!r} any more; {current!r} is current.")
        if self._disk is None:
            return self._memory[version.number, index]
        data = self._disk.read(_path(version, index))
        if (found := _checksum(data)) != version.buckets[index]:
            raise StoreError(
                f"{self._disk.root}/{_path(version, index)} has the checksum {found}, and had {version.buckets[index]} "
                "when it was sent: it was changed or cut off. Send the version again under another label."
            )
        return data

    def _require(self, upload: int) -> _Upload:
        if self._upload is None or upload != self._uploads:
            raise StoreError(
                "the update of weights was given up: another one began, or the store was restarted. Send it again."
            )
        return self._upload

    def _drop_pending(self) -> None:
        pending = self._upload.version if self._upload is not None else self._sealed
        self._upload = self._sealed = None
        if pending is not None:
            self._remove(pending)

    def _remove(self, version: WeightsVersion) -> None:
        for index in range(len(version.buckets)):
            self._memory.pop((version.number, index), None)
        if self._disk is not None and version.buckets:
            self._disk.remove(f"base/{version.number}")

    def _save(self) -> None:
        if self._disk is not None:
            manifest = {"format": FORMAT, "labels": self._labels, "current": asdict(self._current)}
            self._disk.write_manifest(MANIFEST, manifest)

    def _is_written(self, version: WeightsVersion) -> bool:
        """Whether the next store would find this version as the current one."""
        try:
            manifest = None if self._disk is None else self._disk.read_manifest(MANIFEST)
        except ConfigError:
            return False
        return manifest is not None and manifest["current"]["label"] == version.label

    def _recover(self, disk: Disk) -> None:
        if (manifest := disk.read_manifest(MANIFEST)) is not None:
            try:
                if manifest["format"] != FORMAT:
                    raise ConfigError(
                        f"state_dir {disk.root} has weights of format {manifest['format']}, this is format {FORMAT}. "
                        "Name another state_dir."
                    )
                current = manifest["current"]
                self._current = WeightsVersion(**{**current, "buckets": tuple(current["buckets"])})
                self._labels = list(manifest["labels"])
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{disk.root}/{MANIFEST} cannot be read: {type(error).__name__}: {error}. Move it away to begin "
                    "anew, from the model's own files."
                ) from error
            logger.info(f"weights {self._current.label!r} found in {disk.root}")
        for name in disk.entries("base"):
            if name != str(self._current.number):
                disk.remove(f"base/{name}")


def _path(version: WeightsVersion, index: int) -> str:
    return f"base/{version.number}/{index}.safetensors"


def _checksum(data: Any) -> str:
    return str(blake3.blake3(data).hexdigest(length=16))


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], upload: _Upload) -> None:
    """Raises WeightsError for what the model has not, has in another shape, or has already."""
    for name, shape in shapes.items():
        if name in upload.seen:
            raise WeightsError(f"weight {name!r} comes twice.")
        if (wanted := upload.expected.get(name)) is None:
            if name in upload.tied:
                continue
            some = ", ".join(sorted(upload.expected)[:2])
            raise WeightsError(
                f"the model has no weight {name!r}; its own are such as {some}. Name them as get_state_keys() does."
            )
        if shape != wanted:
            raise WeightsError(
                f"weight {name!r} has the shape {shape}, the model's has {wanted}. Send weights of the model that is "
                "served."
            )
