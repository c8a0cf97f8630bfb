"""Buckets that are sent as patches: the store has exactly the bytes of the trainer, or raises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve import TorchSampler
from twinkle_serve.data_format.weights import MAIN_TRACK, Bucket, ModelSpec, WeightSpec
from twinkle_serve.errors import StoreError, WeightsError
from twinkle_serve.packing import buckets
from twinkle_serve.tensors import TensorFile
from twinkle_serve.weights.model import ModelWeights, checksum_of
from twinkle_serve.weights.patches import BLOCK_BYTES, BucketDigests, Patch, PatchFile, is_patch

QUESTION = {"input_ids": list(range(20, 60))}
SIZES = st.lists(st.integers(0, 3 * BLOCK_BYTES), min_size=1, max_size=5)
Tensors = dict[str, torch.Tensor]


def tensors_of(sizes: list[int], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"w{index}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for index, size in enumerate(sizes)
    }


def bucket_of(tensors: Tensors) -> Bucket:
    (bucket,) = buckets(tensors.items())
    return bucket


def patch_of(base: Bucket, tensors: Tensors) -> tuple[Bucket, BucketDigests]:
    files: list[PatchFile] = []

    def new_file(capacity: int) -> TensorFile:
        files.append(PatchFile(BucketDigests.of(base)))
        return files[-1]

    (patch,) = buckets(tensors.items(), new_file=new_file)
    return patch, files[0].digests


def changed(tensors: Tensors, places: list[tuple[int, int]]) -> Tensors:
    """With other values at some places: index of the tensor, and of the value, modulo their numbers."""
    result = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor, place in places:
        one = result[f"w{tensor % len(result)}"]
        if len(one):
            one[place % len(one)] ^= 1
    return result


@given(sizes=SIZES, places=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2**20)), max_size=5))
def test_patch_makes_the_bucket_with_the_blocks_that_changed(sizes: list[int], places: list[tuple[int, int]]) -> None:
    """Wherever tensors and blocks begin and end; it has the bytes of no other blocks."""
    before = tensors_of(sizes, 1)
    after, base = changed(before, places), bucket_of(before)
    patch, digests = patch_of(base, after)
    assert is_patch(patch) and not is_patch(base)
    read = Patch.read(patch)
    assert (read.base, read.checksum) == (checksum_of(base), digests.checksum)
    made = read.apply(base)
    assert made.tobytes() == bucket_of(after).tobytes() or bucket_shapes_equal(made, bucket_of(after))
    assert checksum_of(made) == digests.checksum
    assert len(patch) <= len(set(places)) * BLOCK_BYTES + 2_000


def bucket_shapes_equal(one: Bucket, other: Bucket) -> bool:
    """Whether buckets have the same tensors, though their headers are padded differently."""
    from safetensors.torch import load

    left, right = load(one.tobytes()), load(other.tobytes())
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@given(before=SIZES, after=SIZES)
def test_patch_of_any_bucket_makes_the_bucket(before: list[int], after: list[int]) -> None:
    """One of other tensors, longer or shorter."""
    base, tensors = bucket_of(tensors_of(before, 1)), tensors_of(after, 2)
    patch, _ = patch_of(base, tensors)
    made = Patch.read(patch).apply(base)
    assert bucket_shapes_equal(made, bucket_of(tensors))


def test_patch_of_a_bucket_that_has_not_changed_has_no_blocks() -> None:
    """Its header and its checksum are all that is sent."""
    tensors = tensors_of([10 * BLOCK_BYTES], 1)
    base = bucket_of(tensors)
    patch, _ = patch_of(base, tensors)
    read = Patch.read(patch)
    assert len(patch) < 1_000 and not read.begins


@pytest.mark.parametrize(
    "damage",
    [
        lambda patch: patch[:-1],
        lambda patch: patch[: len(patch) // 2],
        lambda patch: np.concatenate([patch, patch[:8]]),
        lambda patch: replaced(patch, b'"size":"196608"', b'"size":"196607"'),
        lambda patch: replaced(patch, b'"size":"196608"', b'"size":"-96608"'),
        lambda patch: replaced(patch, b'"size":"196608"', b'"size":"19660x"'),
        lambda patch: replaced(patch, b'"checksum"', b'"checksun"'),
        lambda patch: replaced(patch, b'"blocks"', b'"block_"'),
        lambda patch: replaced(patch, np.int64(1).tobytes(), np.int64(3).tobytes()),
        lambda patch: replaced(patch, np.int64(1).tobytes(), np.int64(-1).tobytes()),
    ],
)
def test_damaged_patch_is_refused(damage: Callable[[Bucket], Bucket]) -> None:
    """Also where its parts still fit together."""
    before = tensors_of([3 * BLOCK_BYTES], 1)
    base = bucket_of(before)
    patch, _ = patch_of(base, changed(before, [(0, BLOCK_BYTES + 5)]))
    with pytest.raises((WeightsError, StoreError), match=r"patch of weights is cut off or damaged|makes one with"):
        Patch.read(damage(patch)).apply(base)


def replaced(patch: Bucket, old: bytes, new: bytes) -> Bucket:
    data = patch.tobytes()
    assert data.count(old) >= 1
    return np.frombuffer(data.replace(old, new, 1), np.uint8)


def test_patch_of_another_bucket_is_refused() -> None:
    """Its result would not be the trainer's."""
    before = tensors_of([3 * BLOCK_BYTES], 1)
    base = bucket_of(before)
    patch, _ = patch_of(base, changed(before, [(0, 5)]))
    other = bucket_of(changed(before, [(0, 2 * BLOCK_BYTES)]))
    with pytest.raises(StoreError, match=r"makes one with the checksum .* and the trainer's has .*without delta=True"):
        Patch.read(patch).apply(other)


MODEL = ModelSpec({f"w{index}": WeightSpec((3 * BLOCK_BYTES,), "U8") for index in range(3)}, {})


def test_store_keeps_unchanged_buckets_once(tmp_path: Any) -> None:
    """A version of patches has the buckets of its predecessor that did not change, also on the disk."""
    from twinkle_serve.weights.disk import Disk

    store = ModelWeights(Disk(str(tmp_path)), keep=2)
    before = tensors_of([3 * BLOCK_BYTES] * 3, 1)
    after = changed(before, [(1, 7)])

    def publish(label: str, parts: list[Bucket]) -> Any:
        upload = store.begin(label, MODEL)
        for index, part in enumerate(parts):
            store.append(upload, index, part)
            store.append(upload, index, part)
        version = store.seal(upload)
        store.commit(version, MAIN_TRACK)
        store.persist(version)
        return version

    def patches(bases: list[Bucket], tensors: Tensors) -> list[Bucket]:
        return [patch_of(base, {name: tensors[name]})[0] for base, name in zip(bases, tensors, strict=True)]

    def read(version: Any) -> list[Bucket]:
        return [np.frombuffer(store.bucket(version, index), np.uint8) for index in range(3)]

    zero = publish("zero", list(buckets(before.items(), 1)))
    one = publish("one", patches(read(zero), before))
    two = publish("two", patches(read(one), after))
    assert [a == b for a, b in zip(one.buckets, two.buckets, strict=True)] == [True, False, True]
    assert len(list((tmp_path / "base").iterdir())) == 4
    for version, tensors in ((one, before), (two, after)):
        for bucket, name in zip(read(version), tensors, strict=True):
            assert bucket_shapes_equal(bucket, bucket_of({name: tensors[name]}))
    gone = patches(read(one), after)
    publish("three", patches(read(two), changed(after, [(0, 1), (1, 1), (2, 1)])))
    publish("four", patches(read(store.find("three")), changed(after, [(0, 2), (1, 2), (2, 2)])))
    upload = store.begin("five", MODEL)
    with pytest.raises(StoreError, match="which no kept version has"):
        store.append(upload, 0, gone[0])


def test_sampler_sends_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a first version; all, where the service no longer has that. The engine has the same weights either way."""
    sampler = TorchSampler("demo")
    labels = (f"step-{index}" for index in itertools.count())
    try:
        sent: list[int] = []
        append = ModelWeights.append

        def counted(store: ModelWeights, upload: int, index: int, bucket: Bucket) -> int | None:
            sent.append(len(bucket))
            return append(store, upload, index, bucket)

        monkeypatch.setattr(ModelWeights, "append", counted)
        from twinkle_serve import hub
        from twinkle_serve.checkpoint import named_tensors

        weights = dict(named_tensors(hub.DEMO))
        whole = sum(tensor.nbytes for tensor in weights.values())

        def update(**options: Any) -> int:
            sent.clear()
            sampler.update_weights(weights, next(labels), **options)
            return sum(sent)

        assert update(delta=True) >= whole
        assert update(delta=True) < 10_000
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
        assert update(delta=True) < BLOCK_BYTES + 10_000

        def sampled() -> Any:
            return sampler.sample(QUESTION, {"max_tokens": 8, "temperature": 0}).sequences[0].logprobs

        by_delta = sampled()
        assert update() >= whole
        assert sampled() == by_delta
        assert update(delta=True) >= whole, "the last delta is no longer kept"
        assert update(delta=True) < 10_000
        with pytest.raises(WeightsError):
            sampler.update_weights({"model.norm.weight": weights["model.norm.weight"]}, next(labels), delta=True)
        assert update(delta=True) < 10_000
    finally:
        sampler.shutdown()
