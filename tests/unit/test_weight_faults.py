"""Whatever goes wrong in an update of weights: a typed error, the version before it on every engine, nothing paused,
and the next update works. By each way that buckets come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.eventually import eventually
from tests.support.faulty_updates import DIRECT, STORED, Case, everyone_has, fails_and_heals, faulty_update
from tests.support.slow_disk import SlowDisk
from tests.support.updatable_service import PARTS
from twinkle_serve import hub, timing
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.errors import (
    DeadlineError,
    EngineDeadError,
    EngineError,
    StoreError,
    WeightsError,
)
from twinkle_serve.packing import buckets
from twinkle_serve.weights.disk import Disk
from twinkle_serve.weights.model import ModelWeights

TENSORS = dict(named_tensors(hub.DEMO))
NORM = "model.norm.weight"
PHASES = ("model_spec", "prepare_weights", "pause", "load_weights", "resume")
"""Calls to an engine during an update."""


@pytest.fixture(params=[*STORED, *DIRECT])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def case(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Case]:
    async with faulty_update(way, tmp_path, monkeypatch) as made:
        yield made


# -- what the trainer sends ------------------------------------------------------------------------


def packed(tensors: dict[str, torch.Tensor]) -> list[Bucket]:
    return list(buckets(tensors.items(), 2**20, allow_nonfinite=True))


BAD_PARTS: dict[str, tuple[Callable[[], list[Bucket]], str]] = {
    "a tensor of another shape": (lambda: packed({**TENSORS, NORM: torch.ones(5)}), "has the shape"),
    "a tensor of another dtype": (lambda: packed({**TENSORS, NORM: TENSORS[NORM].int()}), "has the dtype I32"),
    "a value out of range": (
        lambda: packed({**TENSORS, NORM: TENSORS[NORM].double() * 1e300}),
        "would become infinite",
    ),
    "too few": (lambda: packed({name: TENSORS[name] for name in TENSORS if name != NORM}), "lacks 1 of the model's"),
    "one twice": (lambda: [*packed(TENSORS), *packed({NORM: TENSORS[NORM]})], "comes twice"),
    "another model": (
        lambda: packed({"transformer.h.0.weight": torch.ones(3)}),
        "the model has no weight",
    ),
    "a bucket that is cut off": (lambda: [PARTS[0][:-1], *PARTS[1:]], "cut off or damaged"),
    "a bucket of noise": (lambda: [np.arange(999, dtype=np.uint8)], "cut off or damaged"),
    "nothing": (lambda: [], "lacks 46 of the model's 46"),
}


@pytest.mark.parametrize("what", BAD_PARTS)
async def test_bad_weights(case: Case, what: str) -> None:
    """Refused by the store, before an engine is paused."""
    parts, said = BAD_PARTS[what]
    await fails_and_heals(case, WeightsError, said, case.update("two", parts()))


def test_nan_does_not_leave_the_trainer() -> None:
    """Nor infinity, unless it is allowed."""
    for value in (float("nan"), float("inf")):
        with pytest.raises(WeightsError, match="1 values of 128 that are not finite"):
            list(buckets({NORM: torch.cat([TENSORS[NORM][1:], torch.tensor([value])])}.items()))


async def test_bucket_out_of_order(case: Case) -> None:
    """One was lost on the way."""

    async def update() -> None:
        upload = await case.service.router.begin_weights("two", "keep")
        await case.service.router.append_weights(upload, 1, case.carry(PARTS[1]))

    await fails_and_heals(case, StoreError, "bucket 1 of 'two' came after 0 buckets", update())


async def test_two_trainers_at_once(case: Case) -> None:
    """The second one is refused, and does not disturb the first."""
    router = case.service.router
    upload = await router.begin_weights("first", "keep")
    with pytest.raises(WeightsError, match="an update to 'first' is under way"):
        await router.begin_weights("second", "keep")
    for index, part in enumerate(PARTS):
        await router.append_weights(upload, index, case.carry(part))
        with pytest.raises(StoreError, match="given up"):
            await router.append_weights(upload + 1, index, case.carry(part))
    assert await router.publish_weights(upload, "keep", 20) == "first"
    await everyone_has(case, "first")
    with pytest.raises(WeightsError, match="'first' exists already"):
        await router.begin_weights("first", "keep")


# -- a trainer that dies ---------------------------------------------------------------------------


@pytest.mark.parametrize("sent", range(len(PARTS) + 1))
async def test_trainer_that_dies_while_it_sends(case: Case, sent: int) -> None:
    """After any number of buckets: its update is given up, and nothing of it is kept."""
    case.monkeypatch.setattr(timing, "UPLOAD_LEASE_S", 0.1)
    router = case.service.router
    upload = await router.begin_weights("two", "keep")
    for index, part in enumerate(PARTS[:sent]):
        await router.append_weights(upload, index, case.carry(part))
    await eventually(lambda: router._updates._update is None)
    await everyone_has(case, "one")
    with pytest.raises(StoreError, match="given up"):
        await router.publish_weights(upload, "keep", 20)
    assert await case.update("two") == "two", "its label is free"
    await everyone_has(case, "two")


@pytest.mark.parametrize("way", STORED)
@pytest.mark.parametrize("phase", PHASES[1:])
async def test_trainer_that_dies_while_engines_load(case: Case, phase: str) -> None:
    """It has sent everything: the update goes on to its end."""
    call = asyncio.ensure_future(case.update("two"))
    server, reached = case.service.servers["a"], asyncio.Event()
    original = getattr(server, phase)

    async def noticed(*args: Any) -> Any:
        reached.set()
        return await original(*args)

    case.replace(server, phase, noticed)
    await asyncio.wait_for(reached.wait(), 30)
    call.cancel()
    await everyone_has(case, "two")


# -- an engine that dies or fails ------------------------------------------------------------------


@pytest.mark.parametrize("way", STORED)
@pytest.mark.parametrize("phase", PHASES)
async def test_engine_that_dies(case: Case, phase: str) -> None:
    """In any phase: the update does not fail, and the engine comes back with the new version."""
    server = case.service.servers["b"]
    original = getattr(server, phase)
    died: list[str] = []

    async def dies(*args: Any) -> Any:
        if not died:
            died.append(phase)
            raise EngineDeadError("it died.")
        return await original(*args)

    if phase == "model_spec":  # asked of one engine alone
        active = case.service.router._engines.active
        active["a"] = active.pop("a")  # so that it is b
    case.replace(server, phase, dies)
    assert await case.update("two") == "two"
    assert died
    await everyone_has(case, "two")


@pytest.mark.parametrize("way", STORED)
@pytest.mark.parametrize("phase", ["pause", "load_weights"])
async def test_every_engine_dies(case: Case, phase: str) -> None:
    """Nobody has the new weights, so that it is not current."""

    async def dies(*args: Any) -> Any:
        raise EngineDeadError("it died.")

    for server in case.service.servers.values():
        case.replace(server, phase, dies)
    with pytest.raises(EngineDeadError, match=r"every engine died while it loaded 'two'.* 'one' is current"):
        await case.update("two")
    for undo in case.undo:
        undo()
    await everyone_has(case, "one")
    assert await case.update("three") == "three"
    await everyone_has(case, "three")


async def test_engine_that_refuses(case: Case) -> None:
    """The other one goes back."""
    engine = case.service.engines["b"]
    engine.refuses.add("two")
    await fails_and_heals(case, WeightsError, r"b: two is not to my taste\. 'one' is current", case.update("two"))


async def test_engine_whose_weights_differ(case: Case) -> None:
    """By its checksum."""
    case.service.engines["b"].garbles.add("two")
    await fails_and_heals(case, EngineError, r"different weights after they loaded 'two'", case.update("two"))


async def test_engine_that_hangs(case: Case) -> None:
    """Until the deadline."""
    engine = case.service.engines["b"]
    engine.hangs.add("two")
    case.undo.append(engine.let_go.set)
    await fails_and_heals(
        case, DeadlineError, r"not loaded within 1 s for 'two'; 'one' is current", case.update("two", limit_s=1)
    )


@pytest.mark.parametrize("way", STORED)
async def test_engine_without_room_in_memory(case: Case) -> None:
    """A full /dev/shm: it can stage neither the new nor the old weights, and is not used until it can."""
    engine = case.service.engines["b"]
    stage = engine.stage_weights

    async def full(parts: Any) -> Any:
        async with contextlib.aclosing(stage(parts)) as staged:
            async for _ in staged:
                raise EngineError(
                    "b: weights cannot be written to /dev/shm: no space left on device. Free space there."
                )
                yield

    case.replace(engine, "stage_weights", full)
    with pytest.raises(EngineError, match=r"no space left on device\. Free space there\. 'one' is current"):
        await case.update("two")
    assert await case.service.labels() == {("a", "one")}
    case.undo.pop()()
    await everyone_has(case, "one")
    assert await case.update("three") == "three"
    await everyone_has(case, "three")


# -- a disk that fails -----------------------------------------------------------------------------


async def test_full_disk(case: Case) -> None:
    """While buckets come."""
    case.disk.is_full = True
    case.undo.append(lambda: setattr(case.disk, "is_full", False))
    await fails_and_heals(case, StoreError, "no space left on device", case.update("two"))


async def test_disk_that_fills_up_once_the_version_is_current(case: Case) -> None:
    """Its buckets were to be written then: the engines go back."""
    case.disk.go.clear()
    update = asyncio.ensure_future(case.update("two"))
    await case.service.ready_with("two")
    case.disk.is_full = True
    case.undo.append(lambda: setattr(case.disk, "is_full", False))
    case.disk.go.set()
    await fails_and_heals(case, StoreError, "no space left on device; 'one' is current again", update)


async def test_disk_that_has_no_room(case: Case) -> None:
    """For what would be written later: refused before the engines pause."""
    with case.monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000))
        with pytest.raises(StoreError, match=r"do not fit into .*, 1000 are free"):
            await case.update("two", durable=False)
    await everyone_has(case, "one")
    assert await case.update("two", durable=False) == "two"
    await everyone_has(case, "two")


@pytest.mark.parametrize("files", ["buckets", "manifest"])
async def test_state_dir_that_is_read_only(case: Case, files: str) -> None:
    """As a file system becomes after an error. The manifest is written when the engines have the weights already."""
    write = Disk.write

    def refused(disk: Disk, name: str, data: bytes | memoryview) -> None:
        if name.endswith(".json") == (files == "manifest"):
            raise StoreError(f"{name} of {len(data)} bytes cannot be written: OSError: Read-only file system.")
        write(disk, name, data)

    case.replace(SlowDisk, "write", refused)
    await fails_and_heals(case, StoreError, "Read-only file system", case.update("two"))


async def test_slow_state_dir(case: Case) -> None:
    """The version is given up at the deadline, and does not become current later."""
    case.disk.go.clear()
    case.undo.append(case.disk.go.set)
    said = r"the store did not write 'two' within 1 s; 'one' is current again"
    await fails_and_heals(case, DeadlineError, said, case.update("two", limit_s=1))
    assert ModelWeights(case.disk.as_after_a_kill()).current("main").label == "three"


@pytest.mark.parametrize("durable", [True, False])
async def test_store_that_is_killed_before_it_wrote(case: Case, durable: bool) -> None:
    """The new one has the version before: so have all engines, and the label stays used."""
    case.disk.go.clear()
    update = asyncio.ensure_future(case.update("two", durable=durable))
    await case.service.ready_with("two")
    case.service.store._store.model = ModelWeights(case.disk.as_after_a_kill())
    case.disk.go.set()
    if durable:
        with pytest.raises(StoreError, match=r"'two' was not written: the store ended before that; 'one' is current"):
            await update
    else:
        assert await update == "two"
    await everyone_has(case, "one")
    with pytest.raises(WeightsError, match="'two' exists already"):
        await case.update("two")
    assert await case.update("three") == "three"
    await everyone_has(case, "three")
