"""Versions of the model's own weights: current ones, kept ones, and one that is uploaded. Free of Ray."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace

import numpy as np

from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, Bucket, ModelSpec, WeightsState, WeightsVersion
from twinkle_serve.errors import ConfigError, StoreError, WeightsError
from twinkle_serve.weights.disk import Disk, Json
from twinkle_serve.weights.patches import BucketDigests, Patch, is_patch, tensors_begin
from twinkle_serve.weights.upload import Upload

logger = logging.getLogger(__name__)

MANIFEST = "base.json"
FORMAT = 2


@dataclass(slots=True, eq=False)
class _Commit:
    """A version that is current on a track, on its way to the disk."""

    track: str
    version: WeightsVersion
    written: Future[None]
    given_up: bool = False


class ModelWeights:
    """Stores the versions that engines load as the model's own weights.

    Guarantees:
        - A version is complete when `seal` has returned, and current on a track when `commit` has returned; until then
          its predecessor is current.
        - When `persist` has returned, a new store on the same state directory has the version. If the store ends
          earlier, the new one has the predecessor, and the label stays used: samples may carry it.
        - A bucket that differs from the appended one raises and is never returned.
        - No label is used twice.

    Does not guarantee:
        - Persistence beyond this process without a state directory.
    """

    def __init__(self, disk: Disk | None = None, keep: int = 1) -> None:
        """
        Args:
            disk: state directory. None keeps everything in this process's memory.
            keep: how many of the newest versions stay, beside the current ones and the model's checkpoint.

        Raises:
            ConfigError: the manifest cannot be read.
        """
        self._disk, self._keep = disk, keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store writes")
        """Writes and removes files, in the order of the calls."""
        self._writes: dict[str, Future[None]] = {}
        """Files that are being written, by checksum."""
        self._write_late = False
        """Whether the upload is written once it is committed."""
        self._memory: dict[str, Bucket | bytes] = {}
        """Buckets that are not on the disk, by checksum."""
        self._lock = threading.Lock()
        """Held while what the manifest says changes; the writer's thread does that too."""
        self._labels = [CHECKPOINT_VERSION.label]
        """Labels of all versions that have been current; the index is the version's number."""
        self._kept: dict[int, WeightsVersion] = {}
        """Versions that are or have been current, by number, without the checkpoint."""
        self._unwritten: set[int] = set()
        """Numbers of those whose files are being written."""
        self._current: dict[str, WeightsVersion] = {}
        """Current version of each track; of others it is the checkpoint."""
        self._persisted: dict[str, WeightsVersion] = {}
        """Those that a new store would have."""
        self._commits: list[_Commit] = []
        """Those that `persist` has not been asked for."""
        self._upload: Upload | None = None
        # Random, so that a late call for a previous store does not match an upload of this one.
        self._uploads = random.getrandbits(40)
        self._sealed: WeightsVersion | None = None
        if disk is not None:
            self._recover(disk)

    def recover(self) -> WeightsState:
        """Returns all versions.

        Called by a router that starts. An uncommitted upload of its predecessor is dropped; a commit is written first.
        """
        for commit in list(self._commits):
            try:
                self.persist(commit.version)
            except StoreError as error:
                logger.warning(f"version {commit.version.label!r} is given up, it was not written: {error}")
        self._drop_pending()
        return WeightsState(dict(self._current), list(self._labels), self.kept())

    def current(self, track: str) -> WeightsVersion:
        """The version that the engines of a track should have."""
        return self._current.get(track, CHECKPOINT_VERSION)

    def find(self, label: str) -> WeightsVersion:
        """Returns a kept version.

        Raises:
            WeightsError: no version of this label is kept.
        """
        kept = [CHECKPOINT_VERSION, *self._kept.values()]
        for version in kept:
            if version.label == label:
                return version
        held = ", ".join(repr(version.label) for version in kept)
        known = (
            f"was number {self._labels.index(label)} and is no longer kept" if label in self._labels else "is unknown"
        )
        raise WeightsError(
            f"version {label!r} {known}; the store has {held}. Raise weights_versions in the config to keep more."
        )

    def kept(self) -> list[str]:
        """Labels of the versions that `find` returns, the oldest first."""
        return [CHECKPOINT_VERSION.label, *(self._kept[number].label for number in sorted(self._kept))]

    def begin(self, label: str, model: ModelSpec, *, write_late: bool = False) -> int:
        """Begins the upload of a version, in place of an uncommitted one.

        Args:
            label: name of the version.
            model: the weights that it must have.
            write_late: begin to write when the version is current: what others do until then has all cores and all of
                the memory's bandwidth, and `persist` takes longer.

        Returns:
            Id of the upload, for `append`, `seal` and `discard`.

        Raises:
            WeightsError: the label was used before.
        """
        if label in self._labels:
            currents = {repr(version.label) for version in self._current.values()} or {repr(CHECKPOINT_VERSION.label)}
            raise WeightsError(
                f"version {label!r} exists already, it was number {self._labels.index(label)}; current: "
                f"{', '.join(sorted(currents))}. Give each version its own label."
            )
        self._drop_pending()
        self._writes = {checksum: write for checksum, write in self._writes.items() if not write.done()}
        self._uploads += 1
        self._write_late = write_late
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
            bucket: weights as a safetensors file, or a patch of a bucket of a kept version; see `PatchFile`.

        Returns:
            Index of the bucket in the version; None where the version has it otherwise, or not at all.

        Raises:
            WeightsError: the bucket is damaged, or has names or shapes that the model does not have. The upload is
                dropped.
            StoreError: the bucket is out of order, a patch is of a bucket that is not kept, or the state directory
                cannot be written.
        """
        pending = self._require(upload)
        self._raise_failed_writes()
        version, received = pending.version, pending.received
        sent = checksum = checksum_of(bucket)
        is_written = False
        if index == len(received) - 1 and sent == received[index]:
            return pending.last_index  # sent again by a caller that got no answer
        if index != len(received):
            raise StoreError(f"bucket {index} of {version.label!r} came after {len(received)} buckets.")
        try:
            if patch := is_patch(bucket):
                bucket, checksum, is_written = self._patched(Patch.read(bucket))
            kept = pending.take(bucket)
        except WeightsError:
            self._drop_pending()
            raise
        pending.last_index = len(pending.version.buckets) if kept is bucket and not patch else None
        if kept is not None:
            checksum = checksum if kept is bucket else checksum_of(kept)
            self._put(pending, kept, checksum, is_written=is_written and kept is bucket)
        received.append(sent)
        return pending.last_index

    def _patched(self, patch: Patch) -> tuple[Bucket, str, bool]:
        """Returns the bucket that a patch makes, its checksum, and whether it is stored already.

        Raises:
            StoreError: as `Patch.apply`, or the state directory cannot be written.
        """
        base = self._map(patch.base)
        if patch.checksum == patch.base:
            return base, patch.checksum, True
        if self._disk is not None and self._disk.is_local and isinstance(base, np.memmap):
            # In the writer's thread, which may have to remove an earlier file of this name before.
            return self._writer.submit(self._write_patched, self._disk, patch, base).result(), patch.checksum, True
        while len(running := [write for write in self._writes.values() if not write.done()]) > 1:
            wait(running, return_when=FIRST_COMPLETED)  # what is made here fills this process's memory until then
        return patch.apply(base), patch.checksum, False

    def _write_patched(self, disk: Disk, patch: Patch, base: Bucket) -> Bucket:
        path = _path(patch.checksum)
        begin, to = tensors_begin(base), len(patch.header)
        made = disk.write_changed(f"{path}.part", _path(patch.base), begin, to, patch.size, patch.pieces)
        try:
            patch.check(made)
        except StoreError:
            disk.remove(f"{path}.part")
            raise
        disk.rename(f"{path}.part", path)
        return made

    def _put(self, pending: Upload, bucket: Bucket, checksum: str, *, is_written: bool) -> None:
        """Stores a bucket as the next one of its version."""
        version = pending.version
        with self._lock:
            pending.version = replace(
                version, buckets=(*version.buckets, checksum), size_bytes=version.size_bytes + len(bucket)
            )
            if not is_written:
                self._memory[checksum] = bytes(bucket) if self._disk is None else bucket
        if not is_written and not self._write_late:
            self._begin_to_write(checksum)

    def _begin_to_write(self, checksum: str) -> None:
        if self._disk is not None:
            self._writes[checksum] = self._writer.submit(self._write, self._disk, checksum, self._memory[checksum])

    def _write(self, disk: Disk, checksum: str, bucket: Bucket | bytes) -> None:
        try:
            disk.write(_path(checksum), np.frombuffer(bucket, np.uint8).data)
        finally:
            self._memory.pop(checksum, None)

    def seal(self, upload: int) -> WeightsVersion:
        """Ends the upload of a version, which is not current yet. Idempotent.

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
        self._raise_failed_writes()
        if self._disk is not None and self._write_late:
            late = set(pending.version.buckets) & self._memory.keys()
            try:
                self._disk.require_room(sum(len(self._memory[checksum]) for checksum in late))
            except StoreError:
                self._drop_pending()
                raise
        self._upload, self._sealed = None, pending.version
        return pending.version

    def commit(self, version: WeightsVersion, track: str) -> None:
        """Makes a sealed or kept version the current one of a track, and writes that in the background. Idempotent.

        Raises:
            StoreError: the version was dropped, or the state directory cannot be written. The current version stays.
        """
        if version == self.current(track):
            return  # sent again
        is_new = version == self._sealed
        if not is_new:
            self.require(version)
        with self._lock:
            if is_new:
                # The label is on the disk before any sample can carry it.
                self._labels.append(version.label)
                try:
                    self._save()
                except BaseException:
                    self._labels.pop()
                    raise
                self._kept[version.number], self._sealed = version, None
                self._unwritten.add(version.number)
            self._current[track] = version
            commit = _Commit(track, version, Future())
            self._commits.append(commit)
        for checksum in set(version.buckets) & self._memory.keys() - self._writes.keys():
            self._begin_to_write(checksum)
        writes = [self._writes[checksum] for checksum in version.buckets if checksum in self._writes]
        self._writer.submit(self._persist, commit, writes)

    def _persist(self, commit: _Commit, writes: Iterable[Future[None]]) -> None:
        """Records a version as current on the disk, which has its files by now. In the writer's thread."""
        track, version, before = commit.track, commit.version, dict(self._persisted)
        try:
            for write in writes:  # ended: one thread writes everything
                write.result()
            with self._lock:
                if commit.given_up:
                    raise StoreError(f"version {version.label!r} was given up before it was written.")
                self._persisted[track] = version
                was_unwritten = version.number in self._unwritten
                self._unwritten.discard(version.number)
                outdated = self._outdated()
                self._kept = {number: kept for number, kept in self._kept.items() if kept not in outdated}
                try:
                    self._save()
                except BaseException:
                    if not self._is_written(version, track):  # a write may fail after it has taken effect
                        self._persisted = before
                        self._kept |= {kept.number: kept for kept in outdated}
                        if was_unwritten:
                            self._unwritten.add(version.number)
                        raise
            unused = self._drop_buckets(outdated)
            if self._disk is not None:
                self._remove_files(self._disk, unused)
        except BaseException as error:
            commit.written.set_exception(error)
        else:
            commit.written.set_result(None)

    def written(self, version: WeightsVersion) -> Future[None] | None:
        """Ends when a version that is current is on the disk, or cannot be written; None: it is there already."""
        return next((commit.written for commit in self._commits if commit.version == version), None)

    def persist(self, version: WeightsVersion) -> None:
        """Returns when a version that is current is on the disk. Idempotent.

        Raises:
            StoreError: it cannot be written, or it was lost with the store before this one. Its predecessor is current.
        """
        for commit in [commit for commit in self._commits if commit.version == version]:
            wait([commit.written])
            self._commits.remove(commit)
            if (error := commit.written.exception()) is not None:
                self._revert(commit)
                raise error
        if version not in (CHECKPOINT_VERSION, *self._persisted.values()):
            raise StoreError(f"version {version.label!r} was not written: the store ended before that.")

    def revert(self, version: WeightsVersion) -> None:
        """Makes its predecessor current where a version is current and not on the disk."""
        with self._lock:
            unwritten = [
                commit
                for commit in self._commits
                if commit.version == version and self._persisted.get(commit.track) != version
            ]
            for commit in unwritten:
                commit.given_up = True
        for commit in unwritten:
            self._commits.remove(commit)
            self._revert(commit)

    def _revert(self, commit: _Commit) -> None:
        track, version = commit.track, commit.version
        with self._lock:
            if self._current.get(track) == version:
                self._current[track] = self._persisted.get(track, CHECKPOINT_VERSION)
            is_lost = version.number in self._unwritten and version not in self._current.values()
            if is_lost:
                self._unwritten.discard(version.number)
                self._kept.pop(version.number, None)
        if is_lost:
            self._remove([version])

    def discard(self, upload: int) -> None:
        """Drops an uncommitted upload; other ids are ignored."""
        if upload == self._uploads:
            self._drop_pending()

    def purge(self) -> None:
        """Makes the model's checkpoint current and frees all labels.

        Raises:
            StoreError: the state directory cannot be written. Nothing has changed.
        """
        wait([commit.written for commit in self._commits])
        with self._lock:
            before = self._current, self._persisted, self._kept, self._labels
            self._current, self._persisted, self._kept, self._labels = {}, {}, {}, [CHECKPOINT_VERSION.label]
            try:
                self._save()
            except BaseException:
                self._current, self._persisted, self._kept, self._labels = before
                raise
        self._commits.clear()
        self._unwritten.clear()
        self._remove(before[2].values())
        self._drop_pending()

    def bucket(self, version: WeightsVersion, index: int) -> Bucket | bytes:
        """Returns a bucket of a kept or the sealed version.

        Raises:
            StoreError: the version was dropped, or the bucket differs from the appended one.
        """
        self.require(version)
        return self._read(version.buckets[index])

    def file(self, version: WeightsVersion, index: int) -> str | None:
        """Returns the path of a bucket's file, for other processes of the node; None: it is in no local file.

        Raises:
            StoreError: as `bucket`.
        """
        self.require(version)
        checksum = version.buckets[index]
        if self._disk is None or not self._disk.is_local or checksum in self._memory:
            return None
        self._require_checksum(self._disk.map(_path(checksum)), checksum)
        return f"{self._disk.root}/{_path(checksum)}"

    def require(self, version: WeightsVersion) -> None:
        """Raises StoreError for a version that is neither kept nor sealed."""
        if version not in (CHECKPOINT_VERSION, self._kept.get(version.number), self._sealed):
            raise StoreError(
                f"the store no longer has version {version.label!r}; it has {', '.join(map(repr, self.kept()))}."
            )

    def _read(self, checksum: str) -> Bucket | bytes:
        if (held := self._memory.get(checksum)) is not None:
            return held
        if self._disk is None:
            raise StoreError(f"the bucket with the checksum {checksum} was dropped.")
        data = self._disk.read(_path(checksum))
        self._require_checksum(data, checksum)
        return data

    def _require_checksum(self, data: Bucket | bytes, checksum: str) -> None:
        assert self._disk is not None
        if (found := checksum_of(data)) != checksum:
            raise StoreError(
                f"{self._disk.root}/{_path(checksum)} has the checksum {found}, and had {checksum} when it was sent: "
                "the file was changed or truncated. Send the version again under another label."
            )

    def _map(self, checksum: str) -> Bucket:
        """Returns a bucket of a kept version, which may have changed on the disk.

        Raises:
            StoreError: there is no such bucket.
        """
        with self._lock:
            kept = {each for version in self._kept.values() for each in version.buckets}
            held = self._memory.get(checksum)
        if checksum not in kept:
            raise StoreError(
                f"a patch is of a bucket with the checksum {checksum}, which no kept version has. Send the weights "
                "without delta=True."
            )
        if held is not None:
            return np.frombuffer(held, np.uint8)
        assert self._disk is not None
        return self._disk.map(_path(checksum))

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
            self._remove([pending])

    def _raise_failed_writes(self) -> None:
        """Raises the StoreError of a file that could not be written, and drops the upload."""
        ended = {checksum: write for checksum, write in self._writes.items() if write.done()}
        for checksum in ended:
            del self._writes[checksum]
        if error := next(filter(None, (write.exception() for write in ended.values())), None):
            self._drop_pending()
            raise error

    def _outdated(self) -> list[WeightsVersion]:
        """Versions that need not be kept any more."""
        needed = {version.number for version in (*self._current.values(), *self._persisted.values())}
        needed |= set(sorted(self._kept)[-self._keep :])
        return [version for number, version in self._kept.items() if number not in needed]

    def _remove(self, versions: Iterable[WeightsVersion]) -> None:
        """Drops the buckets of versions that no other one has; their files once the writer is at it."""
        unused = self._drop_buckets(versions)
        for checksum in unused:
            if (write := self._writes.pop(checksum, None)) is not None:
                write.cancel()
        if self._disk is not None and unused:
            self._writer.submit(self._remove_files, self._disk, unused)

    def _drop_buckets(self, versions: Iterable[WeightsVersion]) -> set[str]:
        """Drops the buckets of versions that no other one has from memory. Returns their checksums."""
        with self._lock:
            unused = {checksum for version in versions for checksum in version.buckets} - self._used()
            for checksum in unused:
                self._memory.pop(checksum, None)
        return unused

    def _remove_files(self, disk: Disk, checksums: Iterable[str]) -> None:
        """In the writer's thread, so that a bucket that is sent again later stays."""
        for checksum in checksums:
            disk.remove(_path(checksum))

    def _used(self) -> set[str]:
        """Checksums of the buckets of all versions that are kept or on their way."""
        pending = self._upload
        versions = [*list(self._kept.values()), self._sealed, None if pending is None else pending.version]
        return {checksum for version in versions if version is not None for checksum in version.buckets}

    def _save(self) -> None:
        if self._disk is None:
            return
        manifest = {
            "format": FORMAT,
            "labels": self._labels,
            "versions": [asdict(version) for number, version in self._kept.items() if number not in self._unwritten],
            "current": {track: version.number for track, version in self._persisted.items()},
        }
        self._disk.write_manifest(MANIFEST, manifest)

    def _is_written(self, version: WeightsVersion, track: str) -> bool:
        """Whether the manifest on disk has this version as the current one of a track."""
        try:
            manifest = None if self._disk is None else self._disk.read_manifest(MANIFEST)
        except ConfigError:
            return False
        return manifest is not None and manifest["current"].get(track) == version.number

    def _recover(self, disk: Disk) -> None:
        if (manifest := disk.read_manifest(MANIFEST)) is not None:
            try:
                self._take(manifest, disk.root)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ConfigError(
                    f"{disk.root}/{MANIFEST} cannot be read: {type(error).__name__}: {error}. Move it away to start "
                    "from the model's checkpoint."
                ) from error
        used = {f"{checksum}.safetensors" for checksum in self._used()}
        for name in disk.entries(BUCKETS):
            if name not in used:
                disk.remove(f"{BUCKETS}/{name}")

    def _take(self, manifest: Json, root: str) -> None:
        if manifest["format"] != FORMAT:
            raise ConfigError(
                f"state_dir {root} has weights of format {manifest['format']}, this is format {FORMAT}. Name another "
                "state_dir."
            )
        self._labels = list(manifest["labels"])
        for entry in manifest["versions"]:
            version = WeightsVersion(**{**entry, "buckets": tuple(entry["buckets"])})
            self._kept[version.number] = version
        known = {CHECKPOINT_VERSION.number: CHECKPOINT_VERSION, **self._kept}
        self._current = {track: known[number] for track, number in manifest["current"].items()}
        self._persisted = dict(self._current)
        found = ", ".join(f"{version.label!r}" for version in self._current.values())
        logger.info(f"weights {found or CHECKPOINT_VERSION.label!r} found in {root}")


BUCKETS = "base"
"""Directory of the buckets, each named by its checksum."""


def _path(checksum: str) -> str:
    return f"{BUCKETS}/{checksum}.safetensors"


def checksum_of(bucket: Bucket | bytes) -> str:
    """Returns the checksum that names a bucket."""
    return BucketDigests.of(bucket).checksum
