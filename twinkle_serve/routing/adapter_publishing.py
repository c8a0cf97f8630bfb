"""Adds and removes adapters of a router. Free of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.errors import AdapterError, DeadlineError, StoreError
from twinkle_serve.routing.adapter_loading import AdapterLoader
from twinkle_serve.routing.adapters import Adapters, Directory, absolute, read_directory
from twinkle_serve.routing.membership import EngineMembership
from twinkle_serve.weights import StoreClient

logger = logging.getLogger(__name__)

MAX_PATHS = 16
"""Number of adapters kept that are known by their path alone; the least recently used one is dropped."""


DROP_AFTER_S = 0.25
"""Older versions are dropped so long after a new one is published: engines do one thing at a time, and its first
samples come first."""


class AdapterPublisher:
    """Publishes adapter versions to the store and the engines, and drops those that are no longer used."""

    def __init__(
        self,
        adapters: Adapters,
        store: StoreClient,
        engines: EngineMembership,
        loader: AdapterLoader,
        timeout_s: float,
    ) -> None:
        """
        Args:
            timeout_s: deadline for loading an adapter on all engines.
        """
        self._adapters, self._store, self._engines, self._loader = adapters, store, engines, loader
        self._timeout_s = timeout_s
        self._paths: OrderedDict[str, Directory] = OrderedDict()
        """Adapters that are known by path, as they were read; the last used is last."""
        self._adding = asyncio.Lock()
        """Adapters are added one after the other, so that versions of a name are published in order."""

    async def add(self, name: str, source: AdapterFiles | str) -> str:
        """See `RouterAPI.add_adapter`."""
        try:
            async with asyncio.timeout(self._timeout_s), self._adding:
                return await self._add(name, source)
        except TimeoutError:
            raise DeadlineError(
                f"adapter {name!r} was not loaded within startup_timeout_s={self._timeout_s:g}; "
                f"{self._engines.ready} of {self._engines.size} engines are up. Its name means what it meant."
            ) from None

    async def _add(self, name: str, source: AdapterFiles | str, *, is_path: bool = False) -> str:
        await self._engines.wait_for_info()
        files = source if isinstance(source, AdapterFiles) else (await asyncio.to_thread(read_directory, source))[0]
        shared = self._store.share(files, len(self._engines.active))
        version = await self._store.put(name, shared, is_path, self._engines.tracks.named("").name)
        try:
            await self._loader.load(version, shared)
            await self._require_same_weights(version)
            await self._store.publish(version)
        except BaseException:
            self._drop([version])
            raise
        if older := self._adapters.publish(version):
            self._engines.spawn(self._drop_later(older))
        return version.label

    async def _require_same_weights(self, version: AdapterVersion) -> None:
        """Raises AdapterError if the weights with which the engines were to compare tensors of an adapter are not those
        of every track, or have changed."""
        if version.weights is None:
            return
        tracks = self._engines.tracks
        current = [await self._store.current_weights(track.name) for track in tracks]
        if all(each.number == version.weights for each in current):
            return
        first, *others = current
        if any(each != first for each in others):
            raise AdapterError(
                f"adapter {version.name!r} came with tensors of the model itself, and the tracks have different "
                f"weights: {tracks.describe()}. Add it with state_dict=get_peft_model_state_dict(model)."
            )
        raise AdapterError(
            f"adapter {version.name!r} came with tensors of the model itself, and the model's weights were updated to "
            f"{first.label!r} meanwhile. Add it again, or with state_dict=get_peft_model_state_dict(model)."
        )

    async def remove(self, name: str) -> None:
        """See `RouterAPI.remove_adapter`."""
        self._adapters.require(name)
        await self._store.withdraw(name)
        self._drop(self._adapters.remove(name))
        self._paths.pop(name, None)

    def require(self, name: str) -> None:
        """Raises AdapterError for an unknown name or version."""
        self._adapters.resolve(name)

    async def resolve(self, name: str, path: str) -> AdapterVersion | None:
        """Returns the version that a name or a path means; None, the base model, for neither.

        Raises:
            AdapterError: no such adapter, or it cannot be loaded.
        """
        if path:
            return await self._resolve_path(path)
        return self._adapters.resolve(name) if name else None

    async def _resolve_path(self, path: str) -> AdapterVersion:
        """Returns the adapter in a directory, which is read again only after its files have changed."""
        path = absolute(path)
        if not await self._is_current(path):
            async with self._adding:
                if not await self._is_current(path):  # another call may have just read it
                    await self._read(path)
        self._paths.move_to_end(path)
        version = self._adapters.resolve(path)
        while len(self._paths) > MAX_PATHS:
            await self.remove(next(iter(self._paths)))
        return version

    async def _is_current(self, path: str) -> bool:
        now = await asyncio.to_thread(Directory.at, path)
        known = self._paths.get(path)
        return known is not None and known.holds(now)

    async def _read(self, path: str) -> None:
        """Reads a directory, and loads its adapter if its content is new."""
        files, directory = await asyncio.to_thread(read_directory, path)
        known = self._paths.get(path)
        if known is None or known.checksum != directory.checksum:
            await self._add(path, files, is_path=True)
        self._paths[path] = directory

    @contextlib.contextmanager
    def holding(self, adapter: AdapterVersion | None) -> Iterator[None]:
        """Keeps a version loaded while a request uses it."""
        if adapter is None:
            yield
            return
        self._adapters.acquire(adapter)
        try:
            yield
        finally:
            self._drop(self._adapters.release(adapter))

    def staleness(self, adapter: AdapterVersion) -> int | None:
        """Returns how many newer versions its name has; None for an adapter that is known by path."""
        return None if adapter.name in self._paths else self._adapters.staleness(adapter)

    async def _drop_later(self, versions: Sequence[AdapterVersion]) -> None:
        await asyncio.sleep(DROP_AFTER_S)
        self._drop(versions)

    def _drop(self, versions: Sequence[AdapterVersion]) -> None:
        """Drops unused versions from engines and store, in the background."""
        if versions:
            self._loader.drop(versions)
            self._engines.spawn(self._drop_from_store(versions))

    async def _drop_from_store(self, versions: Sequence[AdapterVersion]) -> None:
        try:
            await self._store.drop(versions)
        except StoreError as error:  # the next router drops them
            logger.warning(f"the store keeps {', '.join(version.label for version in versions)}: {error}")
