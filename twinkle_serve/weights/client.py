"""How routers and engines reach the store."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from twinkle_serve.checkpoint import Bucket
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.weights import WeightsVersion
from twinkle_serve.weights.model import CALLS
from twinkle_serve.weights.store import WeightStore

T = TypeVar("T")


class StoreClient(Protocol):
    """The store of a service, in this process (`LocalStore`) or in another. Methods are those of `WeightStore`.

    Every call raises StoreError where the store is gone; what it was about holds after all, or not at all.
    """

    async def published(self) -> dict[str, list[AdapterVersion]]:
        """See `WeightStore.published`."""

    async def put(self, name: str, files: AdapterFiles, *, is_path: bool = False) -> AdapterVersion:
        """See `WeightStore.put`."""

    async def publish(self, version: AdapterVersion) -> None:
        """See `WeightStore.publish`."""

    async def withdraw(self, name: str) -> None:
        """See `WeightStore.withdraw`."""

    async def drop(self, versions: Sequence[AdapterVersion]) -> None:
        """See `WeightStore.drop`."""

    async def files(self, version: AdapterVersion) -> AdapterFiles:
        """See `WeightStore.files`."""

    async def base(self, method: str, *args: Any) -> Any:
        """Calls one of the CALLS of `ModelWeights`. A bucket comes as the sampler's backend made a parcel of it."""

    async def bucket(self, version: WeightsVersion, index: int) -> Bucket:
        """See `ModelWeights.bucket`."""


class LocalStore:
    """A store in this process, off the event loop: it reads, writes and sums up whole files.

    In a thread of its own, since a store is not for several: a call that is abandoned still ends before the next one.
    """

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def _run(self, call: Callable[..., T], *args: Any, **options: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, functools.partial(call, *args, **options))

    async def published(self) -> dict[str, list[AdapterVersion]]:
        return await self._run(self._store.published)

    async def put(self, name: str, files: AdapterFiles, *, is_path: bool = False) -> AdapterVersion:
        return await self._run(self._store.put, name, files, is_path=is_path)

    async def publish(self, version: AdapterVersion) -> None:
        await self._run(self._store.publish, version)

    async def withdraw(self, name: str) -> None:
        await self._run(self._store.withdraw, name)

    async def drop(self, versions: Sequence[AdapterVersion]) -> None:
        await self._run(self._store.drop, versions)

    async def files(self, version: AdapterVersion) -> AdapterFiles:
        return await self._run(self._store.files, version)

    async def base(self, method: str, *args: Any) -> Any:
        assert method in CALLS, method
        return await self._run(getattr(self._store.base, method), *args)

    async def bucket(self, version: WeightsVersion, index: int) -> Bucket:
        return np.frombuffer(await self._run(self._store.base.bucket, version, index), np.uint8)
