"""The store behind a Serve handle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from tenacity import AsyncRetrying, retry_if_exception, wait_fixed

from deployments.handles import send
from deployments.store import BucketPlace, Store
from twinkle_serve import timing
from twinkle_serve.channel import Address
from twinkle_serve.channel_calls import MethodClient
from twinkle_serve.data_format.adapters import AdapterArgument, AdapterFiles, AdapterVersion
from twinkle_serve.data_format.weights import (
    MAIN_TRACK,
    Bucket,
    BucketArgument,
    BucketFile,
    ModelSpec,
    WeightsState,
    WeightsVersion,
)
from twinkle_serve.errors import StoreError, TwinkleServeError
from twinkle_serve.remote.errors import raised_error
from twinkle_serve.weights import StoreClient

P = ParamSpec("P")
T = TypeVar("T")

RETRY_PAUSE_S = 0.2


class ServeStoreClient(StoreClient):
    """Calls a `Store` through a Serve handle, again while it is being replaced: a new one has the state of the old."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

        async def address() -> Address:
            return await send(handle, Store.address)

        self._connection = MethodClient(address)

    def share(self, files: AdapterFiles, engines: int) -> AdapterArgument:
        return files if files.is_small(engines) else [ray.put(files)]

    async def published(self) -> dict[str, list[AdapterVersion]]:
        return await self._call(Store.published)

    async def put(
        self, name: str, files: AdapterArgument, is_path: bool = False, track: str = MAIN_TRACK
    ) -> AdapterVersion:
        if isinstance(files, list):  # Ray counts references in its own calls alone
            return await self._call(Store.put, name, files, is_path, track)
        version: AdapterVersion = await self._call_connected("put", name, files, is_path, track)
        return version

    async def publish(self, version: AdapterVersion) -> None:
        await self._call_connected("publish", version)

    async def withdraw(self, name: str) -> None:
        await self._call_connected("withdraw", name)

    async def drop(self, versions: Sequence[AdapterVersion]) -> None:
        if versions:
            await self._call_connected("drop", list(versions))

    async def files(self, version: AdapterVersion) -> AdapterFiles:
        async def fetch() -> AdapterFiles:
            (reference,) = await send(self._handle, Store.files_ref, version)
            return await reference

        return await until_answered(fetch)

    async def recover_weights(self) -> WeightsState:
        return await self._call(Store.recover_weights)

    async def current_weights(self, track: str) -> WeightsVersion:
        return await self._call(Store.current_weights, track)

    async def find_weights(self, label: str) -> WeightsVersion:
        return await self._call(Store.find_weights, label)

    async def begin_weights(self, label: str, model: ModelSpec, *, write_late: bool = False) -> int:
        return await self._call(Store.begin_weights, label, model, write_late=write_late)

    async def append_weights(self, upload: int, index: int, bucket: BucketArgument) -> int | None:
        return await self._call(Store.append_weights, upload, index, bucket)

    async def seal_weights(self, upload: int) -> WeightsVersion:
        return await self._call(Store.seal_weights, upload)

    async def commit_weights(self, version: WeightsVersion, track: str) -> None:
        await self._call(Store.commit_weights, version, track)

    async def persist_weights(self, version: WeightsVersion) -> list[str]:
        while (kept := await self._call(Store.persist_soon, version)) is None:
            pass  # the caller has a deadline
        return kept

    async def revert_weights(self, version: WeightsVersion) -> None:
        await self._call(Store.revert_weights, version)

    async def discard_weights(self, upload: int) -> None:
        await self._call(Store.discard_weights, upload)

    async def purge_weights(self) -> None:
        await self._call(Store.purge_weights)

    async def bucket(self, version: WeightsVersion, index: int) -> Bucket:
        async def fetch() -> Bucket:
            place = await send(self._handle, Store.bucket_place, version, index)
            with contextlib.suppress(RayError, OSError):  # the trainer that sent it is gone
                return await _at(place)
            place = await send(self._handle, Store.bucket_place, version, index, from_disk=True)
            try:
                return await _at(place)
            except OSError as error:
                raise StoreError(f"a bucket of {version.label!r} cannot be read: {error}") from error

        return await until_answered(fetch)

    async def _call_connected(self, method: str, *arguments: Any) -> Any:
        """Calls one of ADAPTER_CALLS."""
        return await until_answered(lambda: self._connection.call(method, *arguments))

    async def _call(
        self, method: Callable[Concatenate[Store, P], Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> T:
        return await until_answered(lambda: send(self._handle, method, *args, **options))


async def _at(place: BucketPlace) -> Bucket:
    return place.map() if isinstance(place, BucketFile) else await place[0]


async def until_answered(call: Callable[[], Awaitable[T]]) -> T:
    """Repeats a call until a store answers.

    Raises:
        StoreError: none answered in time.
        TwinkleServeError: raised by the store itself.
    """
    last = ""
    try:
        async with asyncio.timeout(timing.STORE_TIMEOUT_S):
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(_is_store_death), wait=wait_fixed(RETRY_PAUSE_S), reraise=True
            ):
                with attempt:
                    try:
                        return await call()
                    except ConnectionError as error:
                        last = f": {error}"
                        raise
    except TimeoutError:
        raise StoreError(
            f"the store did not answer within {timing.STORE_TIMEOUT_S:g} s{last}. See `serve status`."
        ) from None
    except RayError as error:
        if isinstance(raised := raised_error(error), TwinkleServeError):
            raise raised from None
        raise
    raise AssertionError("unreachable")


def _is_store_death(error: BaseException) -> bool:
    if isinstance(error, ConnectionError):
        return True
    return isinstance(error, (RayError, RayServeException)) and raised_error(error) is None
