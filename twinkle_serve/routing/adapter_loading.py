"""Loads adapter versions on engines. Free of Ray."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterable

from twinkle_serve.data_format.adapters import AdapterArgument, AdapterVersion
from twinkle_serve.errors import EngineDeadError, TwinkleServeError
from twinkle_serve.routing.active_engine import ActiveEngine
from twinkle_serve.routing.adapters import Adapters
from twinkle_serve.routing.membership import EngineMembership

logger = logging.getLogger(__name__)


class AdapterLoader:
    """Loads and drops adapter versions on the engines in use, each once."""

    def __init__(self, engines: EngineMembership, adapters: Adapters) -> None:
        self._engines, self._adapters = engines, adapters

    async def load(self, version: AdapterVersion, files: AdapterArgument | None = None) -> None:
        """Loads a version on every engine in use. An engine that dies loads it when it is back and a group needs it.

        Guarantees:
            At least one engine has loaded the version, and so checked it. If the call raises or is cancelled, no engine
                keeps it.

        Raises:
            AdapterError: an engine refuses it.
        """
        try:
            loaded = 0
            while not loaded:
                await self._engines.some_engine()
                loads = [self.load_on(engine, version, files) for engine in self._engines.active.values()]
                results = await asyncio.gather(*loads, return_exceptions=True)
                for error in results:
                    if isinstance(error, BaseException) and not isinstance(error, EngineDeadError):
                        raise error
                loaded = sum(error is None for error in results)
        except BaseException:
            self.drop([version])
            raise

    async def load_on(
        self, engine: ActiveEngine, version: AdapterVersion, files: AdapterArgument | None = None
    ) -> None:
        """Loads a version on an engine, once for all callers; a caller that stops waiting does not stop the load."""
        loading = engine.adapters.get(version.id)
        if loading is None:
            loading = engine.adapters[version.id] = self._engines.spawn(engine.client.load_adapter(version, files))
            # Whether or not anything still waits for the load: after a failure, the next caller tries again.
            loading.add_done_callback(functools.partial(_forget_failed, engine, version.id))
        await engine.unless_lost(asyncio.shield(loading))

    def drop(self, versions: Iterable[AdapterVersion]) -> None:
        """Drops versions that no group uses any more from every engine, in the background."""
        for version in versions:
            for engine in self._engines.active.values():
                self._engines.spawn(self._drop(engine, engine.adapters.pop(version.id, None), version))

    async def _drop(self, engine: ActiveEngine, loading: asyncio.Task[None] | None, version: AdapterVersion) -> None:
        if loading is not None:
            await asyncio.wait({loading})  # a drop that overtook the load would leave the version there
        await self._engines.try_call(engine.name, "drop an adapter", engine.client.drop_adapter(version))

    def prefetch(self, engine: ActiveEngine) -> None:
        """Starts loading the newest version of each adapter, ahead of the first request that needs it."""
        for version in self._adapters.newest.values():
            self._engines.spawn(self._prefetch(engine, version))

    async def _prefetch(self, engine: ActiveEngine, version: AdapterVersion) -> None:
        try:
            await self.load_on(engine, version)
        except TwinkleServeError as error:  # requests for it get the error themselves
            logger.warning(f"{engine.name} did not load {version.label}: {error}")


def _forget_failed(engine: ActiveEngine, version_id: int, loading: asyncio.Task[None]) -> None:
    if (loading.cancelled() or loading.exception()) and engine.adapters.get(version_id) is loading:
        del engine.adapters[version_id]
