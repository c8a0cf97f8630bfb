"""A model's weights as one file, sent and read in pieces of any size."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save, save_file
from safetensors.torch import save as save_torch

from twinkle_serve.errors import WeightsError
from twinkle_serve.weights_file import buckets_of, joined_files

WEIGHTS: dict[str, np.ndarray] = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1, 2, 3], dtype=np.int8),
    "c": np.ones((5, 2), dtype=np.float16),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "scalar": np.array(3.5, dtype=np.float32),
}


async def pieces(data: bytes, size: int) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def read(data: bytes, size: int = 7, *, bucket_bytes: int = 30, most: int = 1000) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    buckets = buckets_of(pieces(data, size), max_weight_bytes=most, bucket_bytes=bucket_bytes)
    async for bucket in buckets:
        part = load(bucket.tobytes())
        assert part and not found.keys() & part.keys()
        found |= part
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("bucket_bytes", [1, 30, 10**6])
async def test_buckets_have_the_weights_of_the_file(size: int, bucket_bytes: int) -> None:
    """Each once, whatever the pieces and the size of buckets; a bucket that readers can map."""
    assert_same(await read(save(WEIGHTS), size, bucket_bytes=bucket_bytes), WEIGHTS)


async def test_files_of_a_model_are_joined(tmp_path: Path) -> None:
    names = list(WEIGHTS)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file({name: WEIGHTS[name] for name in names[:2]}, paths[0], metadata={"format": "pt"})
    save_file({name: WEIGHTS[name] for name in names[2:]}, paths[1])
    size, parts = joined_files(paths)
    data = b"".join(parts)
    assert len(data) == size
    assert_same(load(data), WEIGHTS)
    assert_same(await read(data), WEIGHTS)
    with pytest.raises(WeightsError, match="in two of the files"):
        joined_files([paths[0], paths[0]])


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


GOOD = save(WEIGHTS)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cut off"),
        (GOOD[:20], "cut off"),
        (GOOD[:-1], "cut off"),
        (GOOD + b"x", "goes on"),
        (b"PK\x03\x04" * 100, "not a safetensors file"),
        (header(b"{]"), "damaged"),
        (header(b"[1]"), "damaged"),
        (header(b"[" * 10**5), "damaged"),
        (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}') + b"0" * 8, "damaged"),
        (header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}') + b"0" * 4, "damaged"),
        (header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}'), "damaged"),
        (header(b'{"a":{"dtype":"F32","shape":["x"],"data_offsets":[0,4]}}') + b"0" * 4, "damaged"),
        (header(b'{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}') + b"0" * 4, "damaged"),
        (header(b'{"a":{"dtype":"F32","shape":[300],"data_offsets":[0,1200]}}') + b"0" * 1200, "the limit of one"),
    ],
)
async def test_a_bad_file_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        await read(data)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
async def test_values_that_are_not_finite_are_refused(dtype: torch.dtype, value: float) -> None:
    """In every dtype of floats; its largest finite values are none of them."""
    most = torch.finfo(dtype).max
    fine = torch.tensor([most, -most, 0.0, -1.0], dtype=torch.float64).to(dtype)
    bad = torch.tensor([1.0, value], dtype=torch.float32).to(dtype)
    if dtype is torch.float8_e4m3fn:  # has no infinity
        bad[1] = float("nan")
    buckets = buckets_of(pieces(save_torch({"fine": fine}), 100), max_weight_bytes=100)
    assert len([bucket async for bucket in buckets]) == 1
    data = save_torch({"bad": bad})
    with pytest.raises(WeightsError, match="'bad' has 1 values of 2 that are not finite"):
        [bucket async for bucket in buckets_of(pieces(data, 100), max_weight_bytes=100)]
    allowed = buckets_of(pieces(data, 100), max_weight_bytes=100, allow_nonfinite=True)
    assert len([bucket async for bucket in allowed]) == 1
