"""The weight store: complete versions that survive a restart and are never mixed up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.lora import save_adapter
from twinkle_serve.adapters import CONFIG, WEIGHTS, read_adapter
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.errors import AdapterError, ConfigError, StoreError
from twinkle_serve.weights import WeightStore


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFiles]:
    """Two adapters, of ranks 4 and 8."""
    directory = tmp_path_factory.mktemp("adapters")
    return [read_adapter(save_adapter(directory / str(rank), seed=rank, rank=rank)) for rank in (4, 8)]


@pytest.fixture(params=["memory", "directory", "url"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """Storage of a store: its own memory or a state directory."""
    return {"memory": None, "directory": str(tmp_path / "state"), "url": f"memory://{tmp_path}"}[request.param]


def test_store_returns_the_files_that_were_put(place: str | None, files: list[AdapterFiles]) -> None:
    """Versions count up per name; ids are unique; a dropped version is gone."""
    store = WeightStore("demo", place)
    first, second, other = store.put("a", files[0]), store.put("a", files[1]), store.put("b", files[0])
    assert [v.label for v in (first, second, other)] == ["a@1", "a@2", "b@1"]
    assert len({first.id, second.id, other.id}) == 3
    assert (first.rank, second.rank) == (4, 8)
    assert first.checksum == other.checksum != second.checksum
    assert [store.files(v) for v in (first, second, other)] == [files[0], files[1], files[0]]
    store.drop([second])
    with pytest.raises(StoreError, match="no longer has adapter a@2"):
        store.files(second)
    with pytest.raises(StoreError, match="no longer has adapter a@2"):
        store.publish(second)
    assert store.files(first) == files[0]
    assert store.put("a", files[0]).label == "a@3", "a label is never used twice"


def test_new_store_on_the_same_directory_has_the_published_versions(tmp_path: Path, files: list[AdapterFiles]) -> None:
    """Not unpublished ones, nor those named by a path; version numbers and ids continue."""
    place = str(tmp_path / "state")
    store = WeightStore("demo", place)
    versions = [store.put("a", files[0]), store.put("a", files[1])]
    for version in versions:
        store.publish(version)
    pending, by_path = store.put("a", files[0]), store.put("/tmp/lora@2", files[0], is_path=True)
    store.publish(by_path)
    again = WeightStore("demo", place)
    assert again.published() == {"a": versions}
    assert [again.files(version) for version in versions] == files
    for version in (pending, by_path):
        with pytest.raises(StoreError, match="no longer has"):
            again.files(version)
    new = again.put("a", files[0])
    assert new.label == "a@4" and new.id not in {v.id for v in (*versions, pending, by_path)}
    assert sorted(path.name for path in (tmp_path / "state" / "adapters").iterdir()) == sorted(
        str(v.id) for v in (*versions, new)
    )


def test_withdrawn_name_does_not_come_back(tmp_path: Path, files: list[AdapterFiles]) -> None:
    """A request may still use its version; a router that starts after a crash does not find it."""
    store = WeightStore("demo", str(tmp_path))
    removed, kept = store.put("a", files[0]), store.put("b", files[1])
    for version in (removed, kept):
        store.publish(version)
    store.withdraw("a")
    assert store.files(removed) == files[0]
    assert WeightStore("demo", str(tmp_path)).published() == {"b": [kept]}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_changed_files_are_never_returned(tmp_path: Path, files: list[AdapterFiles], name: str) -> None:
    """Truncated, changed in one byte, or missing: a StoreError; other versions are not affected."""
    store = WeightStore("demo", str(tmp_path))
    broken, whole = store.put("a", files[0]), store.put("b", files[1])
    path = tmp_path / "adapters" / str(broken.id) / name
    good = path.read_bytes()
    for bad in (good[:-1], bytes([good[0] ^ 1]) + good[1:]):
        path.write_bytes(bad)
        with pytest.raises(StoreError, match="were changed or truncated"):
            store.files(broken)
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        store.files(broken)
    assert store.files(whole) == files[1]


def test_failed_write_leaves_nothing_visible(
    tmp_path: Path, files: list[AdapterFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at any of the writes raises StoreError, and the store is unchanged."""
    store = WeightStore("demo", str(tmp_path))
    kept = store.put("a", files[0])
    store.publish(kept)
    system: Any = store._disk._system  # type: ignore[union-attr]
    move, calls = type(system).mv, []
    for failing in range(3):

        def full(self: Any, source: str, target: str, failing: int = failing) -> None:
            calls.append(target)
            if len(calls) > failing:
                raise OSError(28, "No space left on device")
            move(self, source, target)

        calls.clear()
        monkeypatch.setattr(type(system), "mv", full)
        with pytest.raises(StoreError, match="No space left on device"):
            store.put("a", files[1])
        monkeypatch.setattr(type(system), "mv", move)
        assert store.published() == {"a": [kept]}
        assert WeightStore("demo", str(tmp_path)).published() == {"a": [kept]}
    assert store.files(kept) == files[0]
    assert store.files(store.put("a", files[1])) == files[1]


def test_invalid_name_or_files_are_refused(files: list[AdapterFiles]) -> None:
    """Before anything is stored."""
    store = WeightStore("demo")
    for name in ("", "a@1", 3):
        with pytest.raises(AdapterError, match="non-empty string without '@'"):
            store.put(name, files[0])  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="cut off or damaged"):
        store.put("a", AdapterFiles(config=files[0].config, weights=files[0].weights[:-8]))
    assert store.published() == {} and store.put("a", files[0]).label == "a@1"


def test_state_of_another_model_or_damaged_is_refused(tmp_path: Path) -> None:
    """The message has the cause and the remedy; no file is changed."""
    WeightStore("demo", str(tmp_path))
    with pytest.raises(ConfigError, match=r"belongs to model_id 'demo', this service has 'other'"):
        WeightStore("other", str(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for text, message in (
        ("{", "cannot be read: JSONDecodeError"),
        (json.dumps({**manifest, "format": 2}), "format 2, this is format 1"),
        (json.dumps({"format": 1}), "cannot be read: KeyError"),
        ("[]", "cannot be read: TypeError"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            WeightStore("demo", str(tmp_path))
        assert (tmp_path / "manifest.json").read_text() == text
    with pytest.raises(ConfigError, match="cannot be used"):
        WeightStore("demo", "no-such-protocol://x")


def test_store_that_another_one_has_followed_on_a_url_writes_nothing(tmp_path: Path, files: list[AdapterFiles]) -> None:
    """Files there cannot be locked: the earlier of two services is told, and the later one's versions stay."""
    url = f"memory://{tmp_path}"
    first = WeightStore("demo", url)
    first.put("a", files[0])
    second = WeightStore("demo", url)
    second.publish(second.put("b", files[1]))
    with pytest.raises(StoreError, match=f"in use by pid {os.getpid()} on .*one service at a time"):
        first.put("c", files[0])
    with pytest.raises(StoreError, match="one service at a time"):
        first.model.purge()
    assert list(WeightStore("demo", url).published()) == ["b"]
