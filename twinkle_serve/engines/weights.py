"""The model's own weights of one engine: which version it holds, and how it takes another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TypeAlias

from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, Bucket, TransferStep, WeightsVersion
from twinkle_serve.engines.protocol import Engine, StagedBucket
from twinkle_serve.errors import UnsupportedError, WeightsError
from twinkle_serve.tasks import one_ahead

Buckets: TypeAlias = AsyncGenerator[Bucket, None]


class EngineWeights:
    """Loads versions from the store, or takes them from a trainer itself, one at a time.

    While a bucket from the store is loaded the next one is staged, and the one after it fetched. The first two may be
    staged in advance, so that an engine that pauses for a load does not wait for them.
    """

    def __init__(self, engine: Engine, fetch: Callable[[WeightsVersion], Buckets]) -> None:
        """
        Args:
            fetch: yields the buckets of a version.
        """
        self._engine, self._fetch = engine, fetch
        self.version: WeightsVersion | None = CHECKPOINT_VERSION
        """The version that the engine holds; None while it holds none whole."""
        self.changing = asyncio.Lock()
        """Held while weights come, or are staged."""
        self._staged_version: WeightsVersion | None = None
        """The version that is staged in part."""
        self._staged: AsyncGenerator[StagedBucket, None] | None = None
        self._transfer: int | None = None
        """Id of the update whose trainer sends to the engine itself."""

    # -- from the store --------------------------------------------------------------------------

    async def prepare(self, version: WeightsVersion) -> None:
        """Stages the first two buckets of a version, in place of those of another. Raises as `Engine.load_weights`."""
        async with self.changing:
            await self.drop_staged()
            staged = self._stage(version)
            first = await anext(staged, None)
            if first is not None:
                self._staged_version, self._staged = version, _with_first(first, staged)

    async def load(self, version: WeightsVersion) -> str:
        """Loads a version. Returns its checksum; see `Engine.load_weights`."""
        async with self.changing:
            self.version = self._transfer = None
            if version == self._staged_version and self._staged is not None:
                staged, self._staged_version, self._staged = self._staged, None, None
            else:
                await self.drop_staged()
                staged = self._stage(version)
            async with contextlib.aclosing(staged):
                checksum = await self._engine.load_weights(version.label, staged)
            self.version = version
        return checksum

    async def drop_staged(self) -> None:
        """Drops the staged buckets."""
        staged, self._staged_version, self._staged = self._staged, None, None
        if staged is not None:
            await staged.aclose()

    def _stage(self, version: WeightsVersion) -> AsyncGenerator[StagedBucket, None]:
        return one_ahead(self._engine.stage_weights(one_ahead(self._fetch(version))))

    # -- from a trainer itself -------------------------------------------------------------------

    async def transfer(self, step: TransferStep) -> None:
        """See `EngineClient.transfer_weights`."""
        name = self._engine.info.name
        if (receiver := self._engine.receiver) is None:
            raise UnsupportedError("it takes weights from the store alone.")
        workers = step.workers(name)
        async with self.changing:
            if step.call == "init":
                await receiver.init(step.info, workers)
            elif step.call == "start":
                self.version, self._transfer = None, step.upload
                await receiver.start()
            elif step.call == "update":
                self._require(step.upload)
                await receiver.update(step.info, workers)
            else:
                raise WeightsError(f"{step.call!r} is no call of a transfer: init, start, update, finish.")

    async def finish_transfer(self, upload: int, version: WeightsVersion, digests: Mapping[str, str]) -> str:
        """See `EngineClient.finish_transfer`."""
        assert self._engine.receiver is not None
        async with self.changing:
            self._require(upload)
            self._transfer = None
            checksum = await self._engine.receiver.finish(version.label, digests)
            self.version = version
        return checksum

    def _require(self, upload: int) -> None:
        """Raises WeightsError unless an update has begun to send to the engine, and nothing came in between."""
        if self._transfer != upload:
            raise WeightsError("the engine waits for no weights of this update: it has not begun.")


async def _with_first(
    first: StagedBucket, rest: AsyncGenerator[StagedBucket, None]
) -> AsyncGenerator[StagedBucket, None]:
    async with contextlib.aclosing(rest):
        yield first
        async for each in rest:
            yield each
