"""Weights on their way into an engine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TypeAlias

from twinkle_serve.data_format.weights import Bucket, WeightsVersion
from twinkle_serve.engines.protocol import Engine, StagedBucket
from twinkle_serve.tasks import one_ahead

Buckets: TypeAlias = AsyncGenerator[Bucket, None]


class WeightsLoading:
    """Fetches, stages and loads versions of the model's own weights, one at a time.

    While a bucket is loaded the next one is staged, and the one after it fetched. The first two may be staged in
    advance, so that an engine that pauses for a load does not wait for them.
    """

    def __init__(self, engine: Engine, fetch: Callable[[WeightsVersion], Buckets]) -> None:
        """
        Args:
            fetch: yields the buckets of a version.
        """
        self._engine, self._fetch = engine, fetch
        self._version: WeightsVersion | None = None
        """The version that is staged in part."""
        self._staged: AsyncGenerator[StagedBucket, None] | None = None

    async def prepare(self, version: WeightsVersion) -> None:
        """Stages the first two buckets of a version, in place of those of another. Raises as `Engine.load_weights`."""
        await self.drop()
        staged = self._stage(version)
        first = await anext(staged, None)
        if first is not None:
            self._version, self._staged = version, _with_first(first, staged)

    async def load(self, version: WeightsVersion) -> str:
        """Loads a version. Returns its checksum; see `Engine.load_weights`."""
        if version == self._version and self._staged is not None:
            staged, self._version, self._staged = self._staged, None, None
        else:
            await self.drop()
            staged = self._stage(version)
        async with contextlib.aclosing(staged):
            return await self._engine.load_weights(version.label, staged)

    async def drop(self) -> None:
        """Drops the staged buckets."""
        staged, self._version, self._staged = self._staged, None, None
        if staged is not None:
            await staged.aclose()

    def _stage(self, version: WeightsVersion) -> AsyncGenerator[StagedBucket, None]:
        return one_ahead(self._engine.stage_weights(one_ahead(self._fetch(version))))


async def _with_first(
    first: StagedBucket, rest: AsyncGenerator[StagedBucket, None]
) -> AsyncGenerator[StagedBucket, None]:
    async with contextlib.aclosing(rest):
        yield first
        async for each in rest:
            yield each
