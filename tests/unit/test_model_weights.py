"""The store's part of the model's own weights: complete versions that survive a restart, and nothing of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle_serve import hub
from twinkle_serve.checkpoint import bucket_shapes, buckets, named_tensors, weight_shapes
from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, Bucket, WeightsVersion
from twinkle_serve.errors import ConfigError, StoreError, WeightsError
from twinkle_serve.weights.disk import Disk
from twinkle_serve.weights.model import ModelWeights

EXPECTED = weight_shapes(hub.DEMO)
PARTS = list(buckets(named_tensors(hub.DEMO), 2**20))


@pytest.fixture(params=["memory", "directory", "url"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk | None:
    """Storage of a store: its own memory or a state directory."""
    place = {"memory": None, "directory": str(tmp_path / "state"), "url": f"memory://{tmp_path}"}[request.param]
    return None if place is None else Disk(place)


def put(store: ModelWeights, label: str, parts: list[Bucket] = PARTS) -> WeightsVersion:
    upload = store.begin(label, EXPECTED, set())
    for index, part in enumerate(parts):
        store.append(upload, index, part)
    return store.seal(upload)


def files_in(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_buckets_are_bounded_and_hold_everything() -> None:
    """Shown by their headers; a bucket exceeds the requested size by its header at most, unless a tensor is larger."""
    largest = max(4 * int(np.prod(shape)) for shape in EXPECTED.values())
    for limit in (largest, 2**20, 2**40):
        parts = list(buckets(named_tensors(hub.DEMO), limit))
        assert {name: shape for part in parts for name, shape in bucket_shapes(part).items()} == EXPECTED
        assert max(map(len, parts)) < limit + 10_000
    assert len(list(buckets(named_tensors(hub.DEMO), 1))) == len(EXPECTED)


def test_version_is_current_once_it_is_committed(disk: Disk | None) -> None:
    """Its predecessor is gone; its buckets are returned unchanged."""
    store = ModelWeights(disk)
    assert store.recover() == (CHECKPOINT_VERSION, ["initial"])
    one = put(store, "one")
    assert store.current() == CHECKPOINT_VERSION and len(PARTS) > 2
    store.commit(one)
    assert store.current() == one and (one.number, one.size_bytes) == (1, sum(map(len, PARTS)))
    assert [bytes(store.bucket(one, index)) for index in range(len(PARTS))] == [part.tobytes() for part in PARTS]
    two = put(store, "two")
    assert bytes(store.bucket(two, 0)) == PARTS[0].tobytes(), "engines load it before it is current"
    store.commit(two)
    with pytest.raises(StoreError, match="no longer has version 'one'; 'two' is current"):
        store.bucket(one, 0)
    for label in ("initial", "one", "two"):
        with pytest.raises(WeightsError, match="exists already"):
            store.begin(label, EXPECTED, set())


def test_new_store_on_the_same_directory_has_only_the_current_version(tmp_path: Path) -> None:
    """An unfinished upload of the previous store leaves nothing, not even files."""
    store = ModelWeights(Disk(str(tmp_path)))
    one = put(store, "one")
    store.commit(one)
    upload = store.begin("two", EXPECTED, set())
    store.append(upload, 0, PARTS[0])
    again = ModelWeights(Disk(str(tmp_path)))
    assert again.recover() == (one, ["initial", "one"])
    assert files_in(tmp_path) == {"base.json", *(f"base/1/{index}.safetensors" for index in range(len(PARTS)))}
    assert bytes(again.bucket(one, 1)) == PARTS[1].tobytes()
    with pytest.raises(StoreError, match="given up"):
        again.append(upload, 1, PARTS[1])
    sealed = put(again, "two")
    third = ModelWeights(Disk(str(tmp_path)))
    assert third.current() == one
    with pytest.raises(StoreError, match="no longer has version 'two'"):
        third.commit(sealed)


def test_repeated_calls_are_idempotent(disk: Disk | None) -> None:
    """A caller that got no answer sends a call again."""
    store = ModelWeights(disk)
    upload = store.begin("one", EXPECTED, set())
    for index, part in enumerate(PARTS):
        store.append(upload, index, part)
        store.append(upload, index, part)
    version = store.seal(upload)
    assert store.seal(upload) == version
    store.commit(version)
    store.commit(version)
    assert store.recover() == (version, ["initial", "one"])


def test_bucket_out_of_order_is_refused(disk: Disk | None) -> None:
    """A lost bucket is noticed."""
    store = ModelWeights(disk)
    upload = store.begin("one", EXPECTED, set())
    with pytest.raises(StoreError, match="bucket 1 of 'one' came after 0 buckets"):
        store.append(upload, 1, PARTS[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda part: part[:-1], "it has .* bytes of"),
        (lambda part: part[:100], "cut off or damaged"),
        (lambda part: part[:4], "cut off or damaged"),
        (lambda part: np.concatenate([part, part[:8]]), "it has .* bytes of"),
        (lambda part: np.zeros(64, np.uint8), "cut off or damaged"),
        (lambda part: np.full(64, 255, np.uint8), "cut off or damaged"),
    ],
)
def test_damaged_bucket_ends_the_update(disk: Disk | None, damage: Any, message: str) -> None:
    """Nothing of the update is kept."""
    store = ModelWeights(disk)
    upload = store.begin("one", EXPECTED, set())
    store.append(upload, 0, PARTS[0])
    with pytest.raises(WeightsError, match=message):
        store.append(upload, 1, damage(PARTS[1]))
    with pytest.raises(StoreError, match="given up"):
        store.append(upload, 1, PARTS[1])
    assert store.recover() == (CHECKPOINT_VERSION, ["initial"])
    assert not store._memory


def test_changed_file_is_never_returned(tmp_path: Path) -> None:
    """Edited by hand, or corrupted by the disk."""
    store = ModelWeights(Disk(str(tmp_path)))
    one = put(store, "one")
    store.commit(one)
    path = tmp_path / "base" / "1" / "0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"has the checksum .*, and had .* when it was sent"):
        store.bucket(one, 0)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"format": 1, "labels": [], "current": {"label": "a"}}'])
def test_unreadable_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    """It is never silently replaced."""
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(ConfigError, match=r"base\.json|format 2"):
        ModelWeights(Disk(str(tmp_path)))


def test_full_disk_keeps_the_previous_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label can be used again."""
    store = ModelWeights(Disk(str(tmp_path)))
    version = put(store, "one")

    def full(*args: Any) -> None:
        raise StoreError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "write", full)
        with pytest.raises(StoreError, match="no space"):
            store.commit(version)
    assert store.current() == CHECKPOINT_VERSION
    store.commit(version)
    assert store.current() == version


def test_purged_store_starts_over(tmp_path: Path) -> None:
    """With the model's checkpoint and no used labels."""
    store = ModelWeights(Disk(str(tmp_path)))
    store.commit(put(store, "one"))
    store.purge()
    assert files_in(tmp_path) == {"base.json"}
    assert ModelWeights(Disk(str(tmp_path))).recover() == (CHECKPOINT_VERSION, ["initial"])
    assert put(store, "one").number == 1
