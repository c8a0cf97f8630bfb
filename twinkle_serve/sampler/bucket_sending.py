"""Buckets of weights on their way from a trainer to the service."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ray

from twinkle_serve.data_format.weights import Bucket, BucketArgument, BucketFile
from twinkle_serve.memory_files import MemoryDirectory
from twinkle_serve.sampler.router_client import BucketSender
from twinkle_serve.tensors import MappedTensorFile, TensorFile

ROOM_BYTES = 2**26
"""Left free in memory for the files of others."""

MAX_WRITERS = 4
"""More gain nothing: sending, checking and hashing have one thread each."""

logger = logging.getLogger(__name__)


class ObjectStoreSender(BucketSender):
    """Sends buckets through Ray's object store, which takes them to other nodes."""

    def send(self, bucket: Bucket) -> BucketArgument:
        return [ray.put(bucket)]


class FileSender(ObjectStoreSender):
    """Has the store and the engines read buckets where they are: in files in memory, which all of a node share.

    Where these have no room, it sends the rest as its base does.
    """

    def __init__(self, directory: MemoryDirectory) -> None:
        self._directory = directory
        self.writers = min(len(os.sched_getaffinity(0)), MAX_WRITERS)
        self._numbers = itertools.count()
        self._is_full = False

    def new_file(self, capacity: int) -> TensorFile:
        if not self._is_full:
            try:
                self._require_room(self.writers * capacity)
                return MappedTensorFile(self._new_path())
            except OSError as error:
                self._give_up(error)
        return super().new_file(capacity)

    def send(self, bucket: Bucket) -> BucketArgument:
        if isinstance(bucket, np.memmap) and bucket.filename is not None:
            return BucketFile(str(bucket.filename))
        if not self._is_full:
            path = self._new_path()
            try:
                path.write_bytes(bucket.data)
                return BucketFile(str(path))
            except OSError as error:
                path.unlink(missing_ok=True)
                self._give_up(error)
        return super().send(bucket)

    def _new_path(self) -> Path:
        return self._directory.path / f"{next(self._numbers)}.safetensors"

    def _require_room(self, size: int) -> None:
        free = shutil.disk_usage(self._directory.root).free
        if free < size + ROOM_BYTES:
            raise OSError(f"{size} bytes do not fit, {free} are free")

    def _give_up(self, error: OSError) -> None:
        self._is_full = True
        logger.warning(
            f"weights cannot be written to {self._directory.root}: {error}. They go through Ray's object store, which "
            "is slower. Free space there; with docker, raise --shm-size."
        )


@contextlib.contextmanager
def sending() -> Iterator[BucketSender]:
    """See `RouterClient.sending`."""
    if not _is_only_node():
        yield ObjectStoreSender()
        return
    with MemoryDirectory() as directory:
        yield FileSender(directory)


def _is_only_node() -> bool:
    """Whether all processes of the cluster share this one's memory."""
    return not ray.util.client.ray.is_connected() and sum(node["Alive"] for node in ray.nodes()) == 1
