"""Versions of the model's own weights: one is current, another may be uploaded. Free of Ray."""

from __future__ import annotations

import logging
import random
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace

import blake3

from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, Bucket, ModelSpec, WeightsVersion
from twinkle_serve.errors import ConfigError, StoreError, WeightsError
from twinkle_serve.weights.disk import Disk
from twinkle_serve.weights.upload import Upload

logger = logging.getLogger(__name__)

MANIFEST = "base.json"
FORMAT = 1


class ModelWeights:
    """Stores the versions that engines load as the model's own weights.

    Guarantees:
        - A version is complete and current when `commit` has returned; until then its predecessor is current.
        - A new store on the same state directory has the current version, and no part of another.
        - A bucket that differs from the appended one raises and is never returned.
        - No label is used twice.

    Does not guarantee:
        - Persistence beyond this process without a state directory.
    """

    def __init__(self, disk: Disk | None = None) -> None:
        """
        Args:
            disk: state directory. None keeps everything in this process's memory.

        Raises:
            ConfigError: the manifest cannot be read.
        """
        self._disk = disk
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store writes")
        self._writes: dict[str, Future[None]] = {}
        """Files that are being written, by path; each keeps its bucket."""
        self._memory: dict[tuple[int, int], bytes] = {}
        """Buckets by version number and index, without a state directory."""
        self._labels = [CHECKPOINT_VERSION.label]
        """Labels of all versions that have been current; the index is the version's number."""
        self._by_track: dict[str, WeightsVersion] = {}
        self._upload: Upload | None = None
        # Random, so that a late call for a previous store does not match an upload of this one.
        self._uploads = random.getrandbits(40)
        self._sealed: WeightsVersion | None = None
        if disk is not None:
            self._recover(disk)

    def recover(self) -> tuple[dict[str, WeightsVersion], list[str]]:
        """Returns the current version, and the labels of all versions so far by number.

        Called by a router that starts. An uncommitted upload of its predecessor is dropped.
        """
        self._drop_pending()
        return dict(self._by_track), list(self._labels)

    def current(self, track: str = "main") -> WeightsVersion:
        """The version that engines should have."""
        return self._by_track.get(track, CHECKPOINT_VERSION)

    def begin(self, label: str, model: ModelSpec) -> int:
        """Begins the upload of a version, in place of an uncommitted one.

        Args:
            label: name of the version.
            model: the weights that it must have.

        Returns:
            Id of the upload, for `append`, `seal` and `discard`.

        Raises:
            WeightsError: the label was used before.
        """
        if label in self._labels:
            raise WeightsError(
                f"version {label!r} exists already, it was number {self._labels.index(label)}; the current one is "
                f"{self.current().label!r}. Give each version its own label."
            )
        self._drop_pending()
        self._uploads += 1
        version = WeightsVersion(label=label, number=len(self._labels))
        self._upload = Upload(version, model, self._read)
        return self._uploads

    @property
    def pending_number(self) -> int:
        """Number of the version that is being uploaded."""
        return len(self._labels)

    def append(self, upload: int, index: int, bucket: Bucket) -> int | None:
        """Takes the next bucket of an upload, and writes it in the background. Idempotent for the last bucket.

        Args:
            upload: id from `begin`.
            index: number of buckets before it.
            bucket: weights as a safetensors file.

        Returns:
            Index of the bucket in the version; None where the version has it without some weights, or not at all.

        Raises:
            WeightsError: the bucket is damaged, or has names or shapes that the model does not have. The upload is
                dropped.
            StoreError: the bucket is out of order, or the state directory cannot be written.
        """
        pending = self._require(upload)
        self._raise_failed_writes()
        version, received = pending.version, pending.received
        checksum = _checksum(bucket.data)
        if index == len(received) - 1 and checksum == received[index]:
            return pending.last_index  # sent again by a caller that got no answer
        if index != len(received):
            raise StoreError(f"bucket {index} of {version.label!r} came after {len(received)} buckets.")
        try:
            kept = pending.take(bucket)
        except WeightsError:
            self._drop_pending()
            raise
        pending.last_index = len(pending.version.buckets) if kept is bucket else None
        if kept is not None:
            self._put(pending, kept, checksum if kept is bucket else _checksum(kept.data))
        received.append(checksum)
        return pending.last_index

    def _put(self, pending: Upload, bucket: Bucket, checksum: str) -> None:
        """Stores a bucket as the next one of its version."""
        version, index = pending.version, len(pending.version.buckets)
        if self._disk is None:
            self._memory[version.number, index] = bytes(bucket)
        else:
            path = _path(version, index)
            self._writes[path] = self._writer.submit(self._disk.write, path, bucket.data)
        pending.version = replace(
            version, buckets=(*version.buckets, checksum), size_bytes=version.size_bytes + len(bucket)
        )

    def seal(self, upload: int) -> WeightsVersion:
        """Ends the upload of a version, which is not current yet, once its files are written. Idempotent.

        Raises:
            WeightsError: weights of the model are missing. The upload is dropped.
            StoreError: the state directory cannot be written. The upload is dropped.
        """
        if self._sealed is not None and upload == self._uploads:
            return self._sealed  # sent again
        pending = self._require(upload)
        if missing := pending.missing:
            self._drop_pending()
            raise WeightsError(
                f"version {pending.version.label!r} lacks {len(missing)} of the model's {pending.required} "
                f"weights, such as {', '.join(missing[:3])}. Send all of them."
            )
        wait(self._writes.values())
        self._raise_failed_writes()
        self._upload, self._sealed = None, pending.version
        return pending.version

    def commit(self, version: WeightsVersion, track: str = "main") -> None:
        """Makes a sealed version the current one and removes its predecessor. Idempotent.

        Raises:
            StoreError: the version was dropped, or the state directory cannot be written. The current version stays.
        """
        if version == self.current(track):
            return  # sent again
        if version != self._sealed:
            raise StoreError(f"the store no longer has version {version.label!r}. Send it again.")
        before = self.current(track)
        self._by_track[track] = version
        self._labels.append(version.label)
        try:
            self._save()
        except BaseException:
            if not self._is_written(version):  # a write may fail after it has taken effect
                self._by_track[track] = before
                self._labels.pop()
                raise
        self._sealed = None
        self._writer.submit(self._remove, before)  # samples wait for this commit

    def discard(self, upload: int) -> None:
        """Drops an uncommitted upload; other ids are ignored."""
        if upload == self._uploads:
            self._drop_pending()

    def purge(self) -> None:
        """Makes the model's checkpoint current and frees all labels.

        Raises:
            StoreError: the state directory cannot be written. Nothing has changed.
        """
        before, labels = self._by_track, self._labels
        self._by_track, self._labels = {}, [CHECKPOINT_VERSION.label]
        try:
            self._save()
        except BaseException:
            self._by_track, self._labels = before, labels
            raise
        for each in before.values():
            self._remove(each)
        self._drop_pending()

    def bucket(self, version: WeightsVersion, index: int) -> bytes:
        """Returns a bucket of the current or the sealed version.

        Raises:
            StoreError: the version was dropped, or the bucket differs from the appended one.
        """
        self.require(version)
        return self._read(version, index)

    def require(self, version: WeightsVersion) -> None:
        """Raises StoreError for a version that is neither current nor sealed."""
        if version not in (*self._by_track.values(), self._sealed, CHECKPOINT_VERSION):
            current = self.current().label
            raise StoreError(f"the store no longer has version {version.label!r}; {current!r} is current.")

    def _read(self, version: WeightsVersion, index: int) -> bytes:
        if self._disk is None:
            return self._memory[version.number, index]
        path = _path(version, index)
        if (write := self._writes.get(path)) is not None:
            write.result()
        data = self._disk.read(path)
        if (checksum := _checksum(data)) != version.buckets[index]:
            raise StoreError(
                f"{self._disk.root}/{_path(version, index)} has the checksum {checksum}, and had "
                f"{version.buckets[index]} when it was sent: the file was changed or truncated. Send the version again "
                "under another label."
            )
        return data

    def _require(self, upload: int) -> Upload:
        if self._upload is None or upload != self._uploads:
            raise StoreError(
                "the weight update was given up: another one began, or the store was restarted. Send it again."
            )
        return self._upload

    def _drop_pending(self) -> None:
        pending = self._upload.version if self._upload is not None else self._sealed
        self._upload = self._sealed = None
        if pending is not None:
            self._remove(pending)

    def _raise_failed_writes(self) -> None:
        """Raises the StoreError of a file that could not be written, and drops the upload."""
        ended = {path: write for path, write in self._writes.items() if write.done()}
        for path in ended:
            del self._writes[path]
        if error := next(filter(None, (write.exception() for write in ended.values())), None):
            self._drop_pending()
            raise error

    def _remove(self, version: WeightsVersion) -> None:
        for index in range(len(version.buckets)):
            self._memory.pop((version.number, index), None)
            if (write := self._writes.pop(_path(version, index), None)) is not None and not write.cancel():
                wait([write])
        if self._disk is not None and version.buckets:
            self._disk.remove(f"base/{version.number}")

    def _save(self) -> None:
        if self._disk is not None:
            manifest = {
                "format": FORMAT,
                "labels": self._labels,
                "current": {k: asdict(v) for k, v in self._by_track.items()},
            }
            self._disk.write_manifest(MANIFEST, manifest)

    def _is_written(self, version: WeightsVersion) -> bool:
        """Whether the manifest on disk has this version as the current one."""
        try:
            manifest = None if self._disk is None else self._disk.read_manifest(MANIFEST)
        except ConfigError:
            return False
        return manifest is not None and any(each["label"] == version.label for each in manifest["current"].values())

    def _recover(self, disk: Disk) -> None:
        if (manifest := disk.read_manifest(MANIFEST)) is not None:
            try:
                if manifest["format"] != FORMAT:
                    raise ConfigError(
                        f"state_dir {disk.root} has weights of format {manifest['format']}, this is format {FORMAT}. "
                        "Name another state_dir."
                    )
                self._by_track = {
                    track: WeightsVersion(**{**current, "buckets": tuple(current["buckets"])})
                    for track, current in manifest["current"].items()
                }
                self._labels = list(manifest["labels"])
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{disk.root}/{MANIFEST} cannot be read: {type(error).__name__}: {error}. Move it away to start "
                    "from the model's checkpoint."
                ) from error
        for name in disk.entries("base"):
            if name not in [str(each.number) for each in self._by_track.values()]:
                disk.remove(f"base/{name}")


def _path(version: WeightsVersion, index: int) -> str:
    return f"base/{version.number}/{index}.safetensors"


def _checksum(data: bytes | memoryview) -> str:
    return str(blake3.blake3(data).hexdigest(length=16))
