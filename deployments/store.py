"""The store of adapters, weights and sessions as a deployment."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TypeAlias

import ray
from cachetools import LRUCache
from ray import serve

from deployments.log_config import QUIET, log_to_serve
from deployments.metrics import RayMetrics
from twinkle_serve import timing
from twinkle_serve.channel import Address, Listener
from twinkle_serve.channel_calls import MethodServer
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.weights import Bucket, BucketArgument, BucketFile, ModelSpec, WeightsVersion
from twinkle_serve.parent import end_with_parent
from twinkle_serve.placement import SIDE_CPUS
from twinkle_serve.remote.clusters import living_nodes
from twinkle_serve.sessions import LocalSessions, SessionsAPI, SessionStore
from twinkle_serve.tasks import BackgroundTasks
from twinkle_serve.weights import LocalStore, StateLock, WeightStore
from twinkle_serve.weights.disk import local_path

BUCKETS_READ_AGAIN = 3
"""Buckets of weights that are kept in Ray's object store, or whose file is trusted, after they were read."""


BucketPlace: TypeAlias = list[Awaitable[Bucket]] | BucketFile
"""See BucketArgument."""

COUNT_PERIOD_S = 5.0
"""How often the sessions are counted, for the metrics."""

ADAPTER_CALLS = ("put", "publish", "withdraw", "drop")
"""Calls of `StoreClient` that also come over a connection: through a Serve handle, each takes 6 ms more."""

SESSIONS = "sessions"
"""Directory of sessions in the state directory."""


class Store(LocalStore, LocalSessions):
    """A `LocalStore` with sessions. Its files reach the engines through Ray's object store, once per node.

    References are returned in lists: Ray fetches bare ones for the process of the router.
    """

    async def __init__(self, args: ServiceArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        log_to_serve(refusals=False)
        end_with_parent(os.getppid())  # Serve's replicas outlive the raylet that started them
        own_dir = default_state_dir(serve.get_replica_context().app_name, args.model_id)
        state_dir = args.state_dir or own_dir
        # The process of the store before this one may take a moment to end.
        self._state_lock = await asyncio.to_thread(StateLock, state_dir, timing.ENGINE_SHUTDOWN_S)
        LocalStore.__init__(self, await asyncio.to_thread(WeightStore, args.model_id, state_dir, args.weights_versions))
        directory = local_path(state_dir)
        if directory is None:  # files on a URL cannot be appended to
            directory = Path(own_dir)
            self._sessions_lock = await asyncio.to_thread(StateLock, own_dir, timing.ENGINE_SHUTDOWN_S)
        LocalSessions.__init__(self, await asyncio.to_thread(SessionStore, args.sessions, directory / SESSIONS))
        self._listener = Listener()
        self._metrics = RayMetrics()
        self._tasks = BackgroundTasks()
        self._tasks.spawn(self._count_sessions())
        self._adapter_refs: dict[int, Awaitable[AdapterFiles]] = {}
        """References to adapters by id of the version, so that all engines of a node share one copy."""
        self._sent: dict[tuple[int, int], BucketPlace] = {}
        """Where the buckets of an update are, as its trainer sent them, by number of the version and index: engines
        load from the memory where they are already."""
        self._read_again: LRUCache[tuple[int, int], BucketPlace] = LRUCache(BUCKETS_READ_AGAIN)
        """Where others are. Engines ask for one after the other at about the same time, so few are kept."""

    async def _count_sessions(self) -> None:
        while True:
            self._metrics.set(metrics.SESSIONS, await self.count_sessions())
            await asyncio.sleep(COUNT_PERIOD_S)

    async def address(self) -> Address:
        """Returns the address for a connection that carries calls of `SessionsAPI` and those of ADAPTER_CALLS."""
        sessions = [name for name in vars(SessionsAPI) if not name.startswith("_")]
        methods = {name: getattr(self, name) for name in (*sessions, *ADAPTER_CALLS)}
        return await self._listener.open(ray.util.get_node_ip_address(), MethodServer(methods).channel)

    async def drop(self, versions: Sequence[AdapterVersion]) -> None:
        await super().drop(versions)
        for version in versions:
            self._adapter_refs.pop(version.id, None)

    async def files_ref(self, version: AdapterVersion) -> list[Awaitable[AdapterFiles]]:
        """Returns a reference to the files of an adapter version."""
        if version.id not in self._adapter_refs:
            self._adapter_refs[version.id] = ray.put(await self.files(version))
        return [self._adapter_refs[version.id]]

    async def append_weights(self, upload: int, index: int, bucket: BucketArgument) -> int | None:
        kept = await super().append_weights(upload, index, bucket)
        if kept is not None and isinstance(bucket, (list, BucketFile)):
            self._sent[self._store.model.pending_number, kept] = bucket
        return kept

    async def bucket_place(self, version: WeightsVersion, index: int, from_disk: bool = False) -> BucketPlace:
        """Returns where a bucket of a weights version is.

        Args:
            from_disk: it was not where it was said to be, as when the trainer that sent it has died.
        """
        self._store.model.require(version)
        key = version.number, index
        if from_disk:
            self._sent.pop(key, None)
            self._read_again.pop(key, None)
        if key in self._sent:
            return self._sent[key]
        if key not in self._read_again:
            self._read_again[key] = await self._read(version, index)
        return self._read_again[key]

    async def _read(self, version: WeightsVersion, index: int) -> BucketPlace:
        is_only_node = len(living_nodes()) == 1
        if is_only_node and (path := await self._run(self._store.model.file, version, index)) is not None:
            return BucketFile(path)
        return [ray.put(await self.bucket(version, index))]

    def _forget_buckets(self) -> None:
        self._sent.clear()
        self._read_again.clear()

    async def begin_weights(self, label: str, model: ModelSpec, *, write_late: bool = False) -> int:
        self._forget_buckets()  # of an update that nobody has ended
        return await super().begin_weights(label, model, write_late=write_late)

    async def commit_weights(self, version: WeightsVersion, track: str) -> None:
        await super().commit_weights(version, track)
        self._forget_buckets()  # engines that come later have them from the store itself

    async def persist_soon(self, version: WeightsVersion) -> list[str] | None:
        """`persist_weights`; None if it takes longer than a call should."""
        try:
            async with asyncio.timeout(timing.PROBE_TIMEOUT_S):
                return await self.persist_weights(version)
        except TimeoutError:
            return None

    async def discard_weights(self, upload: int) -> None:
        await super().discard_weights(upload)
        self._forget_buckets()

    async def purge_weights(self) -> None:
        await super().purge_weights()
        self._forget_buckets()


store_deployment = serve.deployment(
    name="store",
    # On the head node, where the cluster's own directory outlives the process and lives as long as the cluster.
    ray_actor_options={"num_cpus": SIDE_CPUS, "resources": {"node:__internal_head__": 0.001}},
    max_ongoing_requests=1_000,
    health_check_period_s=2,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=5,
    max_constructor_retry_count=1,
    logging_config=QUIET,
)(Store)


def default_state_dir(application: str, model_id: str) -> str:
    """Returns a directory of the cluster on this node: it survives the store's process, and ends with the cluster."""
    node = ray._private.worker._global_node
    model = hashlib.blake2b(model_id.encode(), digest_size=8).hexdigest()
    return str(Path(node.get_session_dir_path()) / "twinkle-serve" / application / model)
