"""Files of weights are read ahead of their reader: every part, in order, and not all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.eventually import eventually
from twinkle_serve import read_ahead
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.read_ahead import ReadAhead


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of a page more than two parts each."""
    paths = [tmp_path / f"model-{index}.safetensors" for index in range(3)]
    for index, path in enumerate(paths):
        save_file({f"w{index}": torch.full((9 * 1024,), float(index))}, path)
    return paths


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that were read."""
    found: list[Any] = []
    read = read_ahead._read

    def recorded(file: Path, begin: int, size: int) -> None:
        read(file, begin, size)
        found.append((file.name, begin, size))

    monkeypatch.setattr(read_ahead, "_read", recorded)
    monkeypatch.setattr(read_ahead, "PART_BYTES", 2**14)
    monkeypatch.setattr(read_ahead, "PARTS_AHEAD", 2)
    return found


async def test_parts_are_read_a_little_ahead(files: list[Path], parts: list[Any]) -> None:
    """Two of them before anything is used, and one more for each that was."""
    with ReadAhead(files) as ahead:
        await eventually(lambda: len(parts) == 2)
        ahead.used(2**14)
        await eventually(lambda: len(parts) == 3)
        ahead.used(2**20)
        await eventually(lambda: len(parts) == 9)
    assert {name for name, _, _ in parts} == {file.name for file in files}
    assert sum(size for _, _, size in parts) == sum(file.stat().st_size for file in files)


def test_weights_are_the_same(files: list[Path], parts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing can be read ahead."""
    for advice in (read_ahead.MADV_POPULATE_READ, -1):
        monkeypatch.setattr(read_ahead, "MADV_POPULATE_READ", advice)
        read = {name: tensor.unique().tolist() for name, tensor in named_tensors(files[0].parent)}
        assert read == {"w0": [0.0], "w1": [1.0], "w2": [2.0]}
