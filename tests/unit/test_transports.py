"""The order of a trainer's calls to the store, and the clean-up after an early end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.support.eventually import eventually
from tests.support.faulty_updates import Case, everyone_has, faulty_update
from tests.support.transfers import client_of
from twinkle_serve import hub
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.errors import EngineDeadError
from twinkle_serve.memory_files import MemoryDirectory
from twinkle_serve.packing import buckets
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.bucket_sending import FileSender
from twinkle_serve.sampler.loop_thread import LoopThread
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sampler.transports import BucketFiles, UpdateRequest
from twinkle_serve.sampler.weight_upload import WeightUploads


@pytest.fixture
async def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Case]:
    async with faulty_update("array", tmp_path, monkeypatch) as made:
        yield made


def changed(seed: int) -> list[Bucket]:
    return list(buckets(changed_tensors(seed).items(), 2**20))


def changed_tensors(seed: int) -> dict[str, torch.Tensor]:
    """The model's weights with another first value in each."""
    weights = {name: tensor.clone() for name, tensor in named_tensors(hub.DEMO)}
    for tensor in weights.values():
        tensor.view(-1)[0] = seed / 64
    return weights


async def send_delta(uploads: WeightUploads, label: str, seed: int, *, durable: bool = True) -> str:
    def make(files: BucketFiles) -> Iterator[Bucket]:
        return buckets(changed_tensors(seed).items(), 2**20, new_file=files.new_file)

    return await asyncio.to_thread(uploads.send, UpdateRequest(label, "keep", "", durable, 20.0), make, delta=True)


async def test_delta_to_what_the_store_has_once_it_begins(case: Case) -> None:
    """Another trainer's version may come between: then all is sent."""
    router = case.service.router
    uploads = WeightUploads(client_of(router))
    await send_delta(uploads, "first", 1)
    begin = router.begin_weights

    async def begins(*args: Any) -> int:
        case.undo.pop()()
        await case.update("another", changed(9))
        return await begin(*args)

    case.replace(router, "begin_weights", begins)
    assert await send_delta(uploads, "second", 2) == "second"
    await everyone_has(case, "second")


async def test_delta_to_a_version_that_is_not_written_yet(case: Case) -> None:
    """And then cannot be."""
    router = case.service.router
    uploads = WeightUploads(client_of(router))
    case.disk.go.clear()
    await send_delta(uploads, "first", 1, durable=False)
    writing = router._updates._persisting
    assert writing is not None
    second = asyncio.ensure_future(send_delta(uploads, "second", 2))
    await eventually(lambda: router._updates._update is not None)  # it waits for the disk
    case.disk.is_full = True
    writing.add_done_callback(lambda task: setattr(case.disk, "is_full", False))
    case.disk.go.set()
    assert await second == "second"
    await everyone_has(case, "second")


class Service:
    """A service that takes everything, for a trainer with files in memory."""

    def __init__(self) -> None:
        self.loop = LoopThread("service")
        self.calls: list[str] = []
        self.directories: list[Path] = []

    async def call(self, timeout_s: float, method: Any, *args: Any) -> object:
        self.calls.append(method.__name__)
        return 7 if method is RouterAPI.begin_weights else "label"

    @contextlib.contextmanager
    def sending(self) -> Iterator[FileSender]:
        with MemoryDirectory() as directory:
            self.directories.append(directory.path)
            yield FileSender(directory)

    def send(self, parts: Any) -> str:
        update = UpdateRequest("label", "keep", "", True, 5.0)
        return WeightUploads(cast(RouterClient, self)).send(update, parts, delta=False)


def test_files_are_gone_before_the_service_is_told() -> None:
    """A second Ctrl-C may interrupt that call; the files must not outlive it."""
    service = Service()

    def parts(files: BucketFiles) -> Iterator[Bucket]:
        yield np.zeros(10, np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        service.send(parts)
    assert service.calls[-1] == "abandon_weights"
    assert [directory.exists() for directory in service.directories] == [False]
    service.loop.stop(5)


def test_shutdown_while_weights_are_sent() -> None:
    """Of the client, by another thread: a typed error, at once."""
    service = Service()

    def parts(files: BucketFiles) -> Iterator[Bucket]:
        yield np.zeros(10, np.uint8)
        service.loop.stop(5)

    with pytest.raises(EngineDeadError):
        service.send(parts)
