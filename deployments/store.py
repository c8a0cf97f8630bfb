"""The store of weights as a deployment."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import OwnerDiedError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.log_config import QUIET
from twinkle_serve.checkpoint import Bucket
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.weights import WeightsVersion
from twinkle_serve.errors import StoreError, TwinkleServeError
from twinkle_serve.placement import SIDE_CPUS
from twinkle_serve.weights import LocalStore, WeightStore

T = TypeVar("T")

STORE_ANSWERS_S = 120.0
"""Long enough for Serve to replace a store that died."""
PAUSE_S = 0.2

BUCKETS_AHEAD = 3
"""Buckets of the model's own weights that are kept in Ray's object store."""


@serve.deployment(
    name="store",
    # On the head node, where the cluster's own directory outlives the process: what has that node has the cluster.
    ray_actor_options={"num_cpus": SIDE_CPUS, "resources": {"node:__internal_head__": 0.001}},
    max_ongoing_requests=1_000,
    health_check_period_s=2,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=5,
    max_constructor_retry_count=1,
    logging_config=QUIET,
)
class Store:
    """A `WeightStore` behind handles; its files go out through Ray's object store, once a node."""

    async def __init__(self, args: ServiceArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        state_dir = args.state_dir or default_state_dir(serve.get_replica_context().app_name, args.model_id)
        self._store = LocalStore(await asyncio.to_thread(WeightStore, args.model_id, state_dir))
        self._objects: dict[int, Any] = {}
        """References by id of the version: whoever asks for it has the same object."""
        self._buckets: dict[tuple[WeightsVersion, int], Any] = {}
        """The same of the model's own weights, the newest last."""

    async def published(self) -> dict[str, list[AdapterVersion]]:
        return await self._store.published()

    async def put(self, name: str, files: AdapterFiles, *, is_path: bool = False) -> AdapterVersion:
        version = await self._store.put(name, files, is_path=is_path)
        self._objects[version.id] = ray.put(files)
        return version

    async def publish(self, version: AdapterVersion) -> None:
        await self._store.publish(version)

    async def withdraw(self, name: str) -> None:
        await self._store.withdraw(name)

    async def drop(self, versions: Sequence[AdapterVersion]) -> None:
        await self._store.drop(versions)
        for version in versions:
            self._objects.pop(version.id, None)

    async def files(self, version: AdapterVersion) -> list[Any]:
        """A reference to the files: in a list, so that Ray does not fetch them for the router's process."""
        if version.id not in self._objects:
            self._objects[version.id] = ray.put(await self._store.files(version))
        return [self._objects[version.id]]

    async def base(self, method: str, *args: Any) -> Any:
        """Args may hold parcels of `ServiceBackend`: references in lists, which Ray does not fetch on their way."""
        values = [await arg[0] if isinstance(arg, list) else arg for arg in args]
        answer = await self._store.base(method, *values)
        if method in ("commit", "discard", "purge"):  # no engine asks for these buckets any more
            self._buckets.clear()
        return answer

    async def bucket(self, version: WeightsVersion, index: int) -> list[Any]:
        """As `files`. Engines ask for one after the other at about the same time, so few are kept."""
        key = (version, index)
        if key not in self._buckets:
            self._buckets[key] = ray.put(await self._store.bucket(version, index))
            while len(self._buckets) > BUCKETS_AHEAD:
                del self._buckets[next(iter(self._buckets))]
        return [self._buckets[key]]


class ServeStoreClient:
    """The store behind a Serve handle, as a `StoreClient`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def published(self) -> dict[str, list[AdapterVersion]]:
        found: dict[str, list[AdapterVersion]] = await self._call("published")
        return found

    async def put(self, name: str, files: AdapterFiles, *, is_path: bool = False) -> AdapterVersion:
        version: AdapterVersion = await self._call("put", name, files, is_path=is_path)
        return version

    async def publish(self, version: AdapterVersion) -> None:
        await self._call("publish", version)

    async def withdraw(self, name: str) -> None:
        await self._call("withdraw", name)

    async def drop(self, versions: Sequence[AdapterVersion]) -> None:
        if versions:
            await self._call("drop", list(versions))

    async def files(self, version: AdapterVersion) -> AdapterFiles:
        async def fetched() -> AdapterFiles:
            (reference,) = await self._handle.files.remote(version)
            files: AdapterFiles = await reference
            return files

        return await _until_answered(fetched)

    async def base(self, method: str, *args: Any) -> Any:
        return await self._call("base", method, *args)

    async def bucket(self, version: WeightsVersion, index: int) -> Bucket:
        async def fetched() -> Bucket:
            (reference,) = await self._handle.bucket.remote(version, index)
            bucket: Bucket = await reference
            return bucket

        return await _until_answered(fetched)

    async def _call(self, method: str, *args: Any, **options: Any) -> Any:
        return await _until_answered(lambda: getattr(self._handle, method).remote(*args, **options))


async def _until_answered(call: Callable[[], Awaitable[T]]) -> T:
    """Calls a store until one answers: one that dies is replaced, and has what the last one had written.

    Raises:
        StoreError: none answered in time.
        TwinkleServeError: what the store itself raised.
    """
    try:
        async with asyncio.timeout(STORE_ANSWERS_S):
            while True:
                try:
                    return await call()
                except (RayError, RayServeException) as error:
                    if isinstance(error, RayTaskError) and not isinstance(error, (RayActorError, OwnerDiedError)):
                        if isinstance(error.cause, TwinkleServeError):
                            raise error.cause from None
                        raise
                await asyncio.sleep(PAUSE_S)
    except TimeoutError:
        raise StoreError(
            f"the store of weights did not answer within {STORE_ANSWERS_S:g} s. See `serve status`."
        ) from None


def default_state_dir(application: str, model_id: str) -> str:
    """In the cluster's own directory on this node: gone with the cluster, there for a store that replaces this one."""
    node = ray._private.worker._global_node
    model = hashlib.blake2b(model_id.encode(), digest_size=8).hexdigest()
    return str(Path(node.get_session_dir_path()) / "twinkle-serve" / application / model)
