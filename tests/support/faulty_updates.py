"""An update of weights that is to go wrong: whatever does, the version before it stays, and the next update works."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.support.slow_disk import SlowDisk
from tests.support.transfers import Trainer, client_of
from tests.support.updatable_service import PARTS, Service
from twinkle_serve import timing
from twinkle_serve.data_format.weights import Bucket, BucketArgument, BucketFile
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.weights.model import ModelWeights

STORED = ("array", "file", "reference")
"""Ways of a bucket to the store, from which the engines load it: as itself, in a file in memory, in Ray's object store.
"""
DIRECT = ("broadcast", "handles")
"""Ways of weights from a trainer to the engines itself, beside the store: as vLLM's nccl and ipc."""

Carrier: TypeAlias = Callable[[Bucket], BucketArgument]


@dataclass
class Case:
    """A service with version `one`, whose update to `two` is to go wrong."""

    service: Service
    disk: SlowDisk
    carry: Carrier
    monkeypatch: pytest.MonkeyPatch
    trainer: Trainer | None = None
    """Sends to the engines itself."""
    undo: list[Callable[[], object]] = field(default_factory=list)
    """Ends the fault."""

    async def update(
        self, label: str, parts: list[Bucket] = PARTS, *, durable: bool = True, limit_s: float = 20
    ) -> str:
        router = self.service.router
        if self.trainer is not None:
            return await asyncio.to_thread(self.trainer.update, label, parts, durable=durable, limit_s=limit_s)
        upload = await router.begin_weights(label, "keep", durable)
        try:
            for index, part in enumerate(parts):
                await router.append_weights(upload, index, self.carry(part))
            return await router.publish_weights(upload, "keep", limit_s)
        except BaseException:
            with contextlib.suppress(TwinkleServeError):
                await router.abandon_weights(upload)
            raise

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Until the fault ends."""
        before = getattr(owner, name)
        setattr(owner, name, value)
        self.undo.append(lambda: setattr(owner, name, before))


def carrier(way: str, directory: Path) -> Carrier:
    """Makes a bucket the argument of its call."""
    numbers = itertools.count()

    async def fetched(bucket: Bucket) -> Bucket:
        return bucket

    def in_file(bucket: Bucket) -> BucketArgument:
        path = directory / f"bucket-{next(numbers)}"
        path.write_bytes(bucket.tobytes())
        return BucketFile(str(path))

    carriers: dict[str, Carrier] = {"file": in_file, "reference": lambda bucket: [fetched(bucket)]}
    return carriers.get(way, lambda bucket: bucket)


@contextlib.asynccontextmanager
async def faulty_update(way: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Case]:
    """A service of two engines with version `one`, on a disk in a directory."""
    monkeypatch.setattr(timing, "PROBE_PERIOD_S", 0.05)
    monkeypatch.setattr("twinkle_serve.routing.membership.MAX_FAILED_LOADS", 10_000)  # nobody replaces processes here
    service, disk = Service(), SlowDisk(directory / "state")
    service.store._store.model = ModelWeights(disk)
    await service.start()
    made = Case(service, disk, carrier(way, directory), monkeypatch)
    if way in DIRECT:
        made.trainer = Trainer(client_of(service.router), by_handles=way == "handles")
    await made.update("one")
    yield made
    await service.stop()


async def everyone_has(case: Case, label: str) -> None:
    """Every engine samples with a version, none is paused, and the store agrees."""
    await case.service.ready_with(label)
    assert await case.service.labels() == {("a", label), ("b", label)}
    status = await case.service.router.status()
    assert (status["weights"], status["paused"]) == (label, False)


async def fails_and_heals(case: Case, error: type[TwinkleServeError], said: str, update: Awaitable[Any]) -> None:
    with pytest.raises(error, match=said):
        await asyncio.wait_for(update, 60)
    await everyone_has(case, "one")
    for undo in case.undo:
        undo()
    case.undo.clear()
    assert await case.update("three") == "three"
    await everyone_has(case, "three")
