"""Models that are directories of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twinkle_serve import hub
from twinkle_serve.errors import IncompleteModelError, ModelNotFoundError


def sharded(folder: Path, *shards: str, index: str = "model.safetensors.index.json") -> Path:
    """A model directory whose index lists three shards, some of which exist."""
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    (folder / "config.json").write_text("{}")
    (folder / index).write_text(json.dumps({"weight_map": {f"layer.{name}": name for name in names}}))
    for shard in shards:
        (folder / shard).write_bytes(b"")
    return folder


def test_directory_without_its_shards_is_incomplete(tmp_path: Path) -> None:
    """Every missing shard is listed; without weights they are not required."""
    sharded(tmp_path, "model-00001-of-00003.safetensors")
    with pytest.raises(IncompleteModelError, match="lacks 2 of the 3 files") as caught:
        hub.resolve(str(tmp_path))
    assert "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors" in str(caught.value)
    assert hub.resolve(str(tmp_path), weights=False) == tmp_path


def test_directory_with_all_its_shards_is_used_unchanged(tmp_path: Path) -> None:
    """Pickled weights may be absent if there are safetensors."""
    sharded(tmp_path, *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)))
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"layer": "pytorch_model-00001.bin"}}')
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors.index.json").unlink()
    assert hub.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "m.safe', "[]", '{"metadata": {}}', '{"weight_map": []}'])
def test_directory_is_incomplete_when_its_index_cannot_be_read(tmp_path: Path, text: str) -> None:
    """A truncated copy, or a file with other content."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(IncompleteModelError, match=r"model\.safetensors\.index\.json does not name the model's shards"):
        hub.resolve(str(tmp_path))


def test_path_and_demo_have_no_revision(tmp_path: Path) -> None:
    """It would be ignored silently."""
    (tmp_path / "config.json").write_text("{}")
    for model_id in ("demo", str(tmp_path)):
        with pytest.raises(ModelNotFoundError, match="has no revision 'v2'"):
            hub.resolve(model_id, revision="v2")
        assert hub.resolve(model_id).is_dir()
