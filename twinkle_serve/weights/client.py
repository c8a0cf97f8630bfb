"""The interface of the store as routers and engines see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

import numpy as np

from twinkle_serve.data_format.adapters import AdapterArgument, AdapterFiles, AdapterVersion, files_of
from twinkle_serve.data_format.weights import (
    MAIN_TRACK,
    Bucket,
    BucketArgument,
    BucketFile,
    ModelSpec,
    WeightsState,
    WeightsVersion,
)
from twinkle_serve.errors import StoreError
from twinkle_serve.weights.store import WeightStore

P = ParamSpec("P")
T = TypeVar("T")


class StoreClient(Protocol):
    """The store of a service, in this process (`LocalStore`) or behind a handle. See `WeightStore`, `ModelWeights`.

    Every call raises StoreError where the store is gone; its effect may or may not have happened.
    """

    async def published(self) -> dict[str, list[AdapterVersion]]:
        """Returns the published adapter versions by name, newest last; see `WeightStore.published`."""
        ...

    def share(self, files: AdapterFiles, engines: int) -> AdapterArgument:
        """Returns an adapter's files as an argument of `put`, and of so many engines' `load_adapter`. It is of use
        while its process lives and holds it."""
        ...

    async def put(
        self, name: str, files: AdapterArgument, is_path: bool = False, track: str = MAIN_TRACK
    ) -> AdapterVersion:
        """Stores an adapter as the next version of a name; see `WeightStore.put`."""
        ...

    async def publish(self, version: AdapterVersion) -> None:
        """Makes a name mean a version; see `WeightStore.publish`."""

    async def withdraw(self, name: str) -> None:
        """Removes an adapter name; see `WeightStore.withdraw`."""

    async def drop(self, versions: Sequence[AdapterVersion]) -> None:
        """Deletes adapter versions; see `WeightStore.drop`."""

    async def files(self, version: AdapterVersion) -> AdapterFiles:
        """Returns the files of an adapter version; see `WeightStore.files`."""
        ...

    async def recover_weights(self) -> WeightsState:
        """Returns all versions, for a router that starts; see `ModelWeights.recover`."""
        ...

    async def current_weights(self, track: str) -> WeightsVersion:
        """Returns the current weights version of a track."""
        ...

    async def find_weights(self, label: str) -> WeightsVersion:
        """Returns a kept version; see `ModelWeights.find`."""
        ...

    async def begin_weights(self, label: str, model: ModelSpec, *, write_late: bool = False) -> int:
        """Starts an upload and returns its id; see `ModelWeights.begin`."""
        ...

    async def append_weights(self, upload: int, index: int, bucket: BucketArgument) -> int | None:
        """Takes the next bucket of an upload; see `ModelWeights.append`."""
        ...

    async def seal_weights(self, upload: int) -> WeightsVersion:
        """Completes an upload; see `ModelWeights.seal`."""
        ...

    async def commit_weights(self, version: WeightsVersion, track: str) -> None:
        """Makes a sealed or kept version the current one of a track; see `ModelWeights.commit`."""

    async def persist_weights(self, version: WeightsVersion) -> list[str]:
        """Waits until a committed version is on the disk; see `ModelWeights.persist`. Returns the kept labels."""
        ...

    async def revert_weights(self, version: WeightsVersion) -> None:
        """Gives up a committed version that is not on the disk; see `ModelWeights.revert`."""

    async def discard_weights(self, upload: int) -> None:
        """Deletes an upload that was not committed; see `ModelWeights.discard`."""

    async def purge_weights(self) -> None:
        """Makes the model's own files current again and frees all labels; see `ModelWeights.purge`."""

    async def bucket(self, version: WeightsVersion, index: int) -> Bucket:
        """Returns a bucket of a version; see `ModelWeights.bucket`."""
        ...


class LocalStore(StoreClient):
    """A store in this process. It reads, writes and checksums whole files off the event loop.

    Its calls run in one thread, since a store is not thread-safe: an abandoned call ends before the next one starts.
    """

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def _run(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(call, *args, **options))

    async def published(self) -> dict[str, list[AdapterVersion]]:
        return await self._run(self._store.published)

    def share(self, files: AdapterFiles, engines: int) -> AdapterArgument:
        return files

    async def put(
        self, name: str, files: AdapterArgument, is_path: bool = False, track: str = MAIN_TRACK
    ) -> AdapterVersion:
        return await self._run(self._store.put, name, await files_of(files), is_path=is_path, track=track)

    async def publish(self, version: AdapterVersion) -> None:
        await self._run(self._store.publish, version)

    async def withdraw(self, name: str) -> None:
        await self._run(self._store.withdraw, name)

    async def drop(self, versions: Sequence[AdapterVersion]) -> None:
        await self._run(self._store.drop, versions)

    async def files(self, version: AdapterVersion) -> AdapterFiles:
        return await self._run(self._store.files, version)

    async def recover_weights(self) -> WeightsState:
        return await self._run(self._store.model.recover)

    async def current_weights(self, track: str) -> WeightsVersion:
        return await self._run(self._store.model.current, track)

    async def find_weights(self, label: str) -> WeightsVersion:
        return await self._run(self._store.model.find, label)

    async def begin_weights(self, label: str, model: ModelSpec, *, write_late: bool = False) -> int:
        return await self._run(self._store.model.begin, label, model, write_late=write_late)

    async def append_weights(self, upload: int, index: int, bucket: BucketArgument) -> int | None:
        if isinstance(bucket, BucketFile):
            try:
                data = bucket.map()
            except OSError as error:
                raise StoreError(
                    f"the trainer's file of weights cannot be read: {error}. The trainer must be alive, run as the "
                    "same user as the service, and see the same /dev/shm."
                ) from error
        else:
            data = await bucket[0] if isinstance(bucket, list) else bucket
        return await self._run(self._store.model.append, upload, index, data)

    async def seal_weights(self, upload: int) -> WeightsVersion:
        return await self._run(self._store.model.seal, upload)

    async def commit_weights(self, version: WeightsVersion, track: str) -> None:
        await self._run(self._store.model.commit, version, track)

    async def persist_weights(self, version: WeightsVersion) -> list[str]:
        if (writing := self._store.model.written(version)) is not None:
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            writing.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
            await ended.wait()  # meanwhile the thread is free
        await self._run(self._store.model.persist, version)
        return self._store.model.kept()

    async def revert_weights(self, version: WeightsVersion) -> None:
        await self._run(self._store.model.revert, version)

    async def discard_weights(self, upload: int) -> None:
        await self._run(self._store.model.discard, upload)

    async def purge_weights(self) -> None:
        await self._run(self._store.model.purge)

    async def bucket(self, version: WeightsVersion, index: int) -> Bucket:
        return np.frombuffer(await self._run(self._store.model.bucket, version, index), np.uint8)
