"""How a trainer's buckets reach the store and the engines of its node."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from twinkle_serve.data_format.weights import BucketFile
from twinkle_serve.memory_files import MemoryDirectory
from twinkle_serve.packing import buckets
from twinkle_serve.sampler.bucket_sending import FileSender

WEIGHTS = {f"weight-{i}": torch.full((100,), float(i)) for i in range(10)}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def directory() -> Iterator[MemoryDirectory]:
    with MemoryDirectory() as made:
        yield made


def test_a_bucket_is_written_once_and_mapped(directory: MemoryDirectory) -> None:
    """As a safetensors file with nothing else in it."""
    sender = FileSender(directory)
    found: dict[str, Any] = {}
    arguments = [sender.send(part) for part in buckets(WEIGHTS.items(), 1000, new_file=sender.new_file)]
    assert len(arguments) == len(list(directory.path.glob("*.safetensors"))) > 1
    for argument in arguments:
        assert isinstance(argument, BucketFile)
        found |= load_file(argument.path)
        mapped = argument.map()
        assert isinstance(mapped, np.memmap) and mapped.tobytes() == Path(argument.path).read_bytes()
    assert {name: value.tolist() for name, value in found.items()} == {n: t.tolist() for n, t in WEIGHTS.items()}


def test_a_bucket_is_gone_with_its_sender() -> None:
    """A bucket that was mapped before stays readable."""
    with MemoryDirectory() as directory:
        argument = FileSender(directory).send(np.arange(10, dtype=np.uint8))
        assert isinstance(argument, BucketFile)
        mapped = argument.map()
    assert mapped.tolist() == list(range(10)) and not directory.path.exists()
    with pytest.raises(FileNotFoundError):
        argument.map()


def test_a_bucket_from_elsewhere_is_written(directory: MemoryDirectory) -> None:
    (bucket,) = buckets(WEIGHTS.items())
    argument = FileSender(directory).send(bucket)
    assert isinstance(argument, BucketFile) and argument.map().tobytes() == bucket.tobytes()


def test_without_room_buckets_go_through_the_object_store(
    directory: MemoryDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All that come later, and the log says so once."""
    monkeypatch.setattr("ray.put", lambda bucket: "reference")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**30, 2**30, 1000))
    sender = FileSender(directory)
    with caplog.at_level(logging.WARNING):
        arguments = [sender.send(part) for part in buckets(WEIGHTS.items(), 1000, new_file=sender.new_file)]
    assert arguments == [["reference"]] * len(arguments) and len(arguments) > 1
    (record,) = caplog.records
    assert "bytes do not fit, 1000 are free" in record.message and "--shm-size" in record.message
    assert not list(directory.path.glob("*.safetensors"))
