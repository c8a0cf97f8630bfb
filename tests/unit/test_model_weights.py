"""The store's part of the model's own weights: complete versions that survive a restart, and nothing of others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from tests.support.slow_disk import SlowDisk
from twinkle_serve import hub
from twinkle_serve.checkpoint import bucket_shapes, named_tensors, read_model_spec, weight_shapes
from twinkle_serve.data_format.weights import (
    CHECKPOINT_VERSION,
    MAIN_TRACK,
    Bucket,
    ModelSpec,
    WeightSpec,
    WeightsState,
    WeightsVersion,
)
from twinkle_serve.errors import ConfigError, StoreError, WeightsError
from twinkle_serve.packing import buckets
from twinkle_serve.weights.disk import Disk
from twinkle_serve.weights.model import ModelWeights

EXPECTED = weight_shapes(hub.DEMO)
MODEL = read_model_spec(hub.DEMO)
PARTS = list(buckets(named_tensors(hub.DEMO), 2**20))


TENSORS: dict[str, torch.Tensor] = dict(named_tensors(hub.DEMO))
INITIAL = WeightsState({}, ["initial"], ["initial"])
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(params=["memory", "directory", "url"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk | None:
    """Storage of a store: its own memory or a state directory."""
    place = {"memory": None, "directory": str(tmp_path / "state"), "url": f"memory://{tmp_path}"}[request.param]
    return None if place is None else Disk(place)


def put(store: ModelWeights, label: str, parts: list[Bucket] = PARTS) -> WeightsVersion:
    upload = store.begin(label, MODEL)
    for index, part in enumerate(parts):
        store.append(upload, index, part)
    return store.seal(upload)


def publish(store: ModelWeights, label: str, parts: list[Bucket] = PARTS, track: str = MAIN_TRACK) -> WeightsVersion:
    version = put(store, label, parts)
    store.commit(version, track)
    store.persist(version)
    return version


def changed(step: int) -> list[Bucket]:
    """Buckets of which the first one differs by step."""
    norm = TENSORS[NORM] + step
    return list(buckets({NORM: norm, **{name: TENSORS[name] for name in TENSORS if name != NORM}}.items(), 2**20))


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
    assert store.recover() == INITIAL
    one = put(store, "one")
    assert store.current(MAIN_TRACK) == CHECKPOINT_VERSION and len(PARTS) > 2
    store.commit(one, MAIN_TRACK)
    assert store.current(MAIN_TRACK) == one and (one.number, one.size_bytes) == (1, sum(map(len, PARTS)))
    assert [bytes(store.bucket(one, index)) for index in range(len(PARTS))] == [part.tobytes() for part in PARTS]
    two = put(store, "two", changed(2))
    assert bytes(store.bucket(two, 0)) == changed(2)[0].tobytes(), "engines load it before it is current"
    store.commit(two, MAIN_TRACK)
    store.persist(two)
    with pytest.raises(StoreError, match="no longer has version 'one'; it has 'initial', 'two'"):
        store.bucket(one, 0)
    for label in ("initial", "one", "two"):
        with pytest.raises(WeightsError, match="exists already"):
            store.begin(label, MODEL)


def test_new_store_on_the_same_directory_has_only_the_current_version(tmp_path: Path) -> None:
    """An unfinished upload of the previous store leaves nothing, not even files."""
    store = ModelWeights(Disk(str(tmp_path)))
    one = publish(store, "one")
    upload = store.begin("two", MODEL)
    store.append(upload, 0, PARTS[0])
    wait_for_writes(store)
    again = ModelWeights(Disk(str(tmp_path)))
    assert again.recover() == WeightsState({MAIN_TRACK: one}, ["initial", "one"], ["initial", "one"])
    assert files_in(tmp_path) == {"base.json", *(f"base/{checksum}.safetensors" for checksum in one.buckets)}
    assert bytes(again.bucket(one, 1)) == PARTS[1].tobytes()
    with pytest.raises(StoreError, match="given up"):
        again.append(upload, 1, PARTS[1])
    sealed = put(again, "two")
    third = ModelWeights(Disk(str(tmp_path)))
    assert third.current(MAIN_TRACK) == one
    with pytest.raises(StoreError, match="no longer has version 'two'"):
        third.commit(sealed, MAIN_TRACK)


def test_repeated_calls_are_idempotent(disk: Disk | None) -> None:
    """A caller that got no answer sends a call again."""
    store = ModelWeights(disk)
    upload = store.begin("one", MODEL)
    for index, part in enumerate(PARTS):
        store.append(upload, index, part)
        store.append(upload, index, part)
    version = store.seal(upload)
    assert store.seal(upload) == version
    store.commit(version, MAIN_TRACK)
    store.commit(version, MAIN_TRACK)
    assert store.recover() == WeightsState({MAIN_TRACK: version}, ["initial", "one"], ["initial", "one"])


def test_bucket_out_of_order_is_refused(disk: Disk | None) -> None:
    """A lost bucket is noticed."""
    store = ModelWeights(disk)
    upload = store.begin("one", MODEL)
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
    upload = store.begin("one", MODEL)
    store.append(upload, 0, PARTS[0])
    with pytest.raises(WeightsError, match=message):
        store.append(upload, 1, damage(PARTS[1]))
    with pytest.raises(StoreError, match="given up"):
        store.append(upload, 1, PARTS[1])
    assert store.recover() == INITIAL
    assert not store._memory


def test_changed_file_is_never_returned(tmp_path: Path) -> None:
    """Edited by hand, or corrupted by the disk."""
    store = ModelWeights(Disk(str(tmp_path)))
    one = publish(store, "one")
    path = tmp_path / "base" / f"{one.buckets[0]}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"has the checksum .*, and had .* when it was sent"):
        store.bucket(one, 0)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 3}', '{"format": 2, "labels": [], "versions": [], "current": {"a": 1}}']
)
def test_unreadable_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    """It is never silently replaced."""
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(ConfigError, match=r"base\.json|format 3"):
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
            store.commit(version, MAIN_TRACK)
    assert store.current(MAIN_TRACK) == CHECKPOINT_VERSION
    store.commit(version, MAIN_TRACK)
    assert store.current(MAIN_TRACK) == version


def test_purged_store_starts_over(tmp_path: Path) -> None:
    """With the model's checkpoint and no used labels."""
    store = ModelWeights(Disk(str(tmp_path)))
    publish(store, "one")
    store.purge()
    wait_for_writes(store)
    assert files_in(tmp_path) == {"base.json"}
    assert ModelWeights(Disk(str(tmp_path))).recover() == INITIAL
    assert put(store, "one").number == 1


def wait_for_writes(store: ModelWeights) -> None:
    store._writer.submit(lambda: None).result()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_newest_versions_are_kept(disk: Disk | None, keep: int) -> None:
    """Also by a new store; the others' buckets are gone, but for those that a kept version has as well."""
    store = ModelWeights(disk, keep)
    versions = [publish(store, f"step-{step}", changed(step)) for step in range(5)]
    if disk is not None:
        store = ModelWeights(disk, keep)
        names = {name.removesuffix(".safetensors") for name in disk.entries("base")}
        assert names == {checksum for version in versions[-keep:] for checksum in version.buckets}
    assert store.kept() == ["initial", *(f"step-{step}" for step in range(5 - keep, 5))]
    for version in versions[-keep:]:
        assert store.find(version.label) == version
        assert bytes(store.bucket(version, 0)) == changed(version.number - 1)[0].tobytes()
    with pytest.raises(WeightsError, match=r"'step-0' was number 1 and is no longer kept; .*weights_versions"):
        store.find("step-0")
    with pytest.raises(WeightsError, match="'other' is unknown; the store has 'initial', "):
        store.find("other")


def test_kept_version_is_made_current_again(disk: Disk | None) -> None:
    """It keeps its number; the next new one has a number of its own."""
    store = ModelWeights(disk, keep=2)
    one, two = publish(store, "one", changed(1)), publish(store, "two", changed(2))
    for version in (one, CHECKPOINT_VERSION, two, one):
        store.commit(version, MAIN_TRACK)
        store.persist(version)
        assert store.current(MAIN_TRACK) == version
        if disk is not None:
            assert ModelWeights(disk, keep=2).current(MAIN_TRACK) == version
    assert publish(store, "three", changed(3)).number == 3
    assert store.kept() == ["initial", "two", "three"]


def test_each_track_has_a_current_version(disk: Disk | None) -> None:
    """It is kept for as long as it is current on one of them."""
    store = ModelWeights(disk)
    one = publish(store, "one", changed(1), "a")
    for step in (2, 3, 4):
        publish(store, f"step-{step}", changed(step), "b")
    assert store.kept() == ["initial", "one", "step-4"]
    assert bytes(store.bucket(one, 0)) == changed(1)[0].tobytes()
    assert store.current("c") == CHECKPOINT_VERSION
    if disk is not None:
        assert {track: version.label for track, version in ModelWeights(disk).recover().current.items()} == {
            "a": "one",
            "b": "step-4",
        }


def test_version_is_current_before_it_is_on_the_disk(tmp_path: Path) -> None:
    """Engines have it from memory. A store that is killed then leaves its predecessor, and the label stays used."""
    disk = SlowDisk(tmp_path)
    store = ModelWeights(disk)
    one = publish(store, "one", changed(1))
    disk.go.clear()
    two = put(store, "two", changed(2))
    store.commit(two, MAIN_TRACK)
    assert store.current(MAIN_TRACK) == two
    assert bytes(store.bucket(two, 0)) == changed(2)[0].tobytes()
    written = store.written(two)
    assert written is not None and not written.done()
    again = ModelWeights(disk.as_after_a_kill())
    assert again.recover() == WeightsState({MAIN_TRACK: one}, ["initial", "one", "two"], ["initial", "one"])
    with pytest.raises(StoreError, match="'two' was not written: the store ended before that"):
        again.persist(two)
    with pytest.raises(WeightsError, match="'two' exists already"):
        again.begin("two", MODEL)
    disk.go.set()
    store.persist(two)
    assert ModelWeights(Disk(str(tmp_path))).current(MAIN_TRACK) == two


def test_version_that_cannot_be_written_makes_room_for_its_predecessor(tmp_path: Path) -> None:
    """And leaves no files; the next version is taken."""
    disk = SlowDisk(tmp_path)
    store = ModelWeights(disk)
    one = publish(store, "one", changed(1))
    disk.go.clear()
    two = put(store, "two", changed(2))
    store.commit(two, MAIN_TRACK)
    disk.is_full = True
    disk.go.set()
    with pytest.raises(StoreError, match="no space"):
        store.persist(two)
    assert store.current(MAIN_TRACK) == one and store.kept() == ["initial", "one"] and not store._memory
    disk.is_full = False
    wait_for_writes(store)
    assert files_in(tmp_path) == {"base.json", *(f"base/{checksum}.safetensors" for checksum in one.buckets)}
    three = publish(store, "three", changed(3))
    assert ModelWeights(Disk(str(tmp_path))).current(MAIN_TRACK) == three


def test_version_may_be_written_once_it_is_current(tmp_path: Path) -> None:
    """Nothing is on the disk before; a new store has it afterwards."""
    store = ModelWeights(Disk(str(tmp_path)))
    upload = store.begin("one", MODEL, write_late=True)
    for index, part in enumerate(PARTS):
        store.append(upload, index, part)
    one = store.seal(upload)
    wait_for_writes(store)
    assert not files_in(tmp_path)
    assert bytes(store.bucket(one, 0)) == PARTS[0].tobytes()
    store.commit(one, MAIN_TRACK)
    store.persist(one)
    assert not store._memory
    again = ModelWeights(Disk(str(tmp_path)))
    assert again.current(MAIN_TRACK) == one and bytes(again.bucket(one, 1)) == PARTS[1].tobytes()


def test_version_that_will_not_fit_is_refused_before_it_is_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose buckets cannot be written while they come; its label is free."""
    store = ModelWeights(Disk(str(tmp_path)))
    upload = store.begin("one", MODEL, write_late=True)
    for index, part in enumerate(PARTS):
        store.append(upload, index, part)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000))
        with pytest.raises(StoreError, match=rf"{sum(map(len, PARTS))} bytes do not fit into .*, 1000 are free"):
            store.seal(upload)
    assert not store._memory
    assert publish(store, "one").number == 1


def test_version_that_takes_too_long_to_write_is_given_up(tmp_path: Path) -> None:
    """Though the disk has it later."""
    disk = SlowDisk(tmp_path)
    disk.go.clear()
    store = ModelWeights(disk)
    one = put(store, "one", changed(1))
    store.commit(one, MAIN_TRACK)
    store.revert(one)
    assert store.current(MAIN_TRACK) == CHECKPOINT_VERSION and store.kept() == ["initial"]
    disk.go.set()
    wait_for_writes(store)
    assert files_in(tmp_path) == {"base.json"}
    assert ModelWeights(Disk(str(tmp_path))).recover() == WeightsState({}, ["initial", "one"], ["initial"])
    two = publish(store, "two", changed(2))
    store.revert(two)
    assert store.current(MAIN_TRACK) == two, "it is on the disk"


def test_router_that_starts_finds_what_is_on_the_disk(tmp_path: Path) -> None:
    """A commit that cannot be written is gone by then."""
    disk = SlowDisk(tmp_path)
    store = ModelWeights(disk)
    disk.is_full = True
    disk.go.clear()
    store.commit(put(store, "one", changed(1)), MAIN_TRACK)
    disk.go.set()
    assert store.recover() == WeightsState({MAIN_TRACK: CHECKPOINT_VERSION}, ["initial", "one"], ["initial"])


def placed(name: str, tensor: torch.Tensor, where: str) -> dict[str, torch.Tensor]:
    return {name: tensor, **TENSORS} if where == "first" else {**TENSORS, name: tensor}


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("limit", [1, 2**20, 2**30])
@pytest.mark.parametrize("cast", [torch.float32, torch.float64])
def test_tied_name_with_the_embeddings_values_is_left_out(
    disk: Disk | None, where: str, limit: int, cast: torch.dtype
) -> None:
    """Before or after the embedding, in its bucket, another or one of its own: engines get each weight once."""
    store = ModelWeights(disk)
    tensors = placed(HEAD, TENSORS[EMBEDDING].to(cast), where)
    version = put(store, "one", list(buckets(tensors.items(), limit)))
    read: dict[str, torch.Tensor] = {}
    for index in range(len(version.buckets)):
        part = load(bytes(store.bucket(version, index)))
        assert part and not part.keys() & read.keys()
        read |= part
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in read)
    assert version.size_bytes == sum(len(store.bucket(version, index)) for index in range(len(version.buckets)))


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("limit", [1, 2**20, 2**30])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[:5], r"has the shape \(5, 128\), the model's 'model.embed_tokens.weight'"),
        (lambda tensor: tensor.T.contiguous(), "has the shape"),
        (lambda tensor: torch.cat([tensor[:-1], tensor[-1:] + 1]), "differs from 'model.embed_tokens.weight'"),
        (lambda tensor: tensor.bfloat16(), "differs from 'model.embed_tokens.weight'"),
        (lambda tensor: tensor.int(), r"has the dtype I32 \(integer\), .* has F32 \(float\)"),
    ],
)
def test_tied_name_that_is_not_the_embedding_ends_the_update(
    disk: Disk | None, where: str, limit: int, change: Any, message: str
) -> None:
    """By its shape, its dtype or a single row; the model has no place for it, and engines would differ."""
    store = ModelWeights(disk)
    with pytest.raises(WeightsError, match=f"'lm_head.weight' {message}"):
        put(store, "one", list(buckets(placed(HEAD, change(TENSORS[EMBEDDING]), where).items(), limit)))
    assert not store._memory and store.recover() == INITIAL


def test_repeated_bucket_of_tied_names_is_idempotent(disk: Disk | None) -> None:
    """Though nothing of it is stored."""
    store = ModelWeights(disk)
    upload = store.begin("one", MODEL)
    parts = list(buckets(placed(HEAD, TENSORS[EMBEDDING], "last").items(), 1))
    for index, part in enumerate(parts):
        store.append(upload, index, part)
        store.append(upload, index, part)
    assert len(store.seal(upload).buckets) == len(parts) - 1 == len(TENSORS)


def test_tied_name_does_not_stand_for_the_embedding() -> None:
    """Without the embedding itself the version is incomplete."""
    rest = {name: tensor for name, tensor in TENSORS.items() if name != EMBEDDING}
    with pytest.raises(WeightsError, match="lacks 1 of the model's 46 weights, such as model"):
        put(ModelWeights(), "one", list(buckets({**rest, HEAD: TENSORS[EMBEDDING]}.items())))


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("int64", r"I64 \(integer\)"),
        ("int8", r"I8 \(integer\)"),
        ("uint8", r"U8 \(integer\)"),
        ("bool", r"BOOL \(bool\)"),
        ("float8_e4m3fn", r"F8_E4M3 \(fp8\)"),
        ("float8_e5m2", r"F8_E5M2 \(fp8\)"),
        ("complex64", r"C64 \(complex\)"),
    ],
)
def test_weight_of_another_class_of_dtypes_is_refused(dtype: str, said: str) -> None:
    """Both dtypes are named. Values of another class mean something else, such as those of a quantized weight."""
    tensors = {**TENSORS, NORM: TENSORS[NORM].to(getattr(torch, dtype))}
    with pytest.raises(WeightsError, match=rf"'model.norm.weight' has the dtype {said}, the model's has F32 \(float\)"):
        put(ModelWeights(), "one", list(buckets(tensors.items())))


@pytest.mark.parametrize(
    ("held", "engine", "sent", "value", "said"),
    [
        ("F16", "", torch.float32, 65536.0, "65536 in F32; the engines hold it in F16, up to 65504"),
        ("F16", "", torch.bfloat16, -1e6, "999424 in BF16; .* in F16"),
        ("F32", "", torch.float64, 1e39, r"1e\+39 in F64; .* in F32, up to 3.40282e\+38"),
        ("BF16", "", torch.float64, -3.4e38, r"3.4e\+38 in F64; .* in BF16, up to 3.38953e\+38"),
        ("F32", "F16", torch.float32, 65536.0, "65536 in F32; .* in F16"),
        ("BF16", "F16", torch.bfloat16, 1e5, "99840 in BF16; .* in F16"),
        ("F16", "F32", torch.float32, 1e9, ""),
        ("F16", "BF16", torch.bfloat16, 1e9, ""),
        ("F32", "", torch.float64, 3e38, ""),
        ("F32", "", torch.float32, 3.4e38, ""),
        ("F16", "", torch.float32, 65504.0, ""),
    ],
)
@pytest.mark.parametrize("nonfinite", [None, float("inf"), float("nan")])
def test_value_that_would_be_infinite_in_the_engine_ends_the_update(
    held: str, engine: str, sent: torch.dtype, value: float, said: str, nonfinite: float | None
) -> None:
    """The engine's dtype counts, or else the checkpoint's; values that were sent as infinite are as they are."""
    spec = ModelSpec({"w": WeightSpec((3, 100_000), held), "s": WeightSpec((), held)}, {}, engine)
    weight = torch.ones(3, 100_000, dtype=sent)
    weight[2, 99_998] = value
    if nonfinite is not None:
        weight[0, 0] = weight[2, 99_999] = nonfinite
    tensors = {"w": weight, "s": torch.tensor(value, dtype=sent)}
    store = ModelWeights()
    upload, part = store.begin("one", spec), next(buckets(tensors.items(), allow_nonfinite=True))
    if not said:
        store.append(upload, 0, part)
        return
    with pytest.raises(WeightsError, match=f"weight 'w' has values of magnitude {said}.*engine_args.dtype"):
        store.append(upload, 0, part)
    assert not store._memory


def test_weight_that_is_partitioned_has_its_remedy() -> None:
    """DeepSpeed's ZeRO-3 leaves empty tensors in a state_dict."""
    tensors = {name: torch.empty(0) for name in TENSORS}
    with pytest.raises(WeightsError, match=r"has the shape \(0,\), .*GatheredParameters"):
        put(ModelWeights(), "one", list(buckets(tensors.items())))


def test_weights_of_a_quantized_model_have_its_dtypes() -> None:
    """Floats do not stand for its packed values, nor integers of another width, whose values could not be held."""
    spec = ModelSpec({"w": WeightSpec((4,), "F8_E4M3"), "q": WeightSpec((4,), "I8"), "s": WeightSpec((4,), "BF16")}, {})
    good = {"w": torch.ones(4).to(torch.float8_e4m3fn), "q": torch.ones(4, dtype=torch.int8), "s": torch.ones(4)}
    store = ModelWeights()
    store.append(store.begin("one", spec), 0, next(buckets(good.items())))
    for name, tensor in (("w", torch.ones(4)), ("q", torch.ones(4, dtype=torch.uint8)), ("q", torch.ones(4))):
        with pytest.raises(WeightsError, match=f"'{name}' has the dtype"):
            store.append(store.begin("one", spec), 0, next(buckets({**good, name: tensor}.items())))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("base_model.model.model.norm.weight", r"merge_and_unload\(\)"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", r"merge_and_unload\(\)"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", r"merge_and_unload\(\)"),
        ("model.norm.modules_to_save.default.weight", r"merge_and_unload\(\)"),
        ("_fsdp_wrapped_module.model.norm.weight", "FSDP"),
        ("model.layers.0._fsdp_wrapped_module._flat_param", "FSDP"),
        ("_orig_mod.model.norm.weight", "torch.compile"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight", "checkpointing"),
        ("module.model.norm.weight", r"the state_dict of model\.module"),
        ("model.normm.weight", r"get_state_keys\(\)"),
    ],
)
def test_name_of_a_trainers_wrapper_has_its_remedy(name: str, remedy: str) -> None:
    """An adapter that is not merged, FSDP, torch.compile and others."""
    with pytest.raises(WeightsError, match=f"the model has no weight '{name}'.*{remedy}"):
        put(ModelWeights(), "one", list(buckets({name: TENSORS[NORM]}.items())))
