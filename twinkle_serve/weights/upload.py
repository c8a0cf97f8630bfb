"""Checks of the buckets of one upload of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from twinkle_serve.checkpoint import PackedWeight, read_bucket, without_weights
from twinkle_serve.data_format.weights import Bucket, ModelSpec, WeightSpec, WeightsVersion
from twinkle_serve.errors import WeightsError
from twinkle_serve.tensors import CLASSES, FLOAT_READERS, MAX_FINITE, WRAPPERS, find_remedy, overflow

CHUNK_BYTES = 2**24

MERGE = (
    "It is of an adapter that is not merged. Pass the model of peft with merge_lora=True, or the state_dict of what "
    "its merge_and_unload() returns; or add the adapter with add_adapter_to_model."
)
PARTITIONED = "It is partitioned, as by DeepSpeed's ZeRO-3. Send it gathered: with deepspeed.zero.GatheredParameters."
REMEDIES: dict[str, str] = {
    "lora_": MERGE,
    "base_layer.": MERGE,
    "modules_to_save.": MERGE,
    "original_module.": MERGE,
    "base_model.model.": MERGE,
    **WRAPPERS,
}
"""What to do about a name that the model does not have, by the start of one of its parts."""


@dataclass(slots=True)
class _Held:
    """Values of a tied name that came before the weight itself."""

    dtype: str
    data: Bucket


class Upload:
    """The weights of one version as they arrive.

    Guarantees:
        Buckets for the engines hold weights of the model alone, each once, of its shape and class of dtypes.
        Tied names that have the values of the weight that they are tied to are left out; others raise.
    """

    def __init__(self, version: WeightsVersion, model: ModelSpec, stored: Callable[[str], Bucket | bytes]) -> None:
        """
        Args:
            version: the version without its buckets.
            stored: returns a bucket of the version that was stored before, by its checksum.
        """
        self.version = version
        """Updated by the caller, with each bucket that it has stored."""
        self.received: list[str] = []
        """Checksum of each bucket as it came; kept by the caller."""
        self.last_index: int | None = None
        """Index in the version of the last bucket as it came; kept by the caller."""
        self._model = model
        self._stored = stored
        self._required = model.required
        self._seen: set[str] = set()
        self._places: dict[str, int] = {}
        """Index of the stored bucket of each weight that has tied names."""
        self._held: dict[str, _Held] = {}
        """Tied names that came before their weight."""

    def take(self, bucket: Bucket) -> Bucket | None:
        """Checks the next bucket. Returns it as it is to be stored, the next of the version; None: nothing of it.

        Raises:
            WeightsError: it is damaged, or holds names, shapes, dtypes or values that the model does not have.
        """
        weights = read_bucket(bucket)
        for name, weight in weights.items():
            self._check(name, weight.spec)
            self._check_range(name, weight, bucket)
        self._seen |= weights.keys()
        tied = {name for name in weights if name in self._model.tied}
        self._compare_tied(bucket, weights, tied)
        return without_weights(bucket, tied) if tied else bucket

    @property
    def missing(self) -> list[str]:
        """Names of the model's weights that have not arrived."""
        return sorted(self._required.keys() - self._seen)

    @property
    def required(self) -> int:
        """Number of weights that an upload must have."""
        return len(self._required)

    def _check(self, name: str, spec: WeightSpec) -> None:
        """Raises WeightsError for a weight that is repeated, unknown to the model, or of another shape or class."""
        if name in self._seen:
            raise WeightsError(f"weight {name!r} comes twice.")
        wanted = self._model.weights.get(self._model.tied.get(name, name))
        if wanted is None:
            raise WeightsError(self._unknown(name))
        of_model = (
            f"the model's {self._model.tied[name]!r}, to which it is tied,"
            if name in self._model.tied
            else "the model's"
        )
        if spec.shape != wanted.shape:
            remedy = PARTITIONED if spec.shape == (0,) else "Send weights of the served model."
            raise WeightsError(f"weight {name!r} has the shape {spec.shape}, {of_model} has {wanted.shape}. {remedy}")
        kind, wanted_kind = CLASSES[spec.dtype], CLASSES.get(wanted.dtype)
        if kind != wanted_kind or (kind != "float" and spec.dtype != wanted.dtype):
            raise WeightsError(
                f"weight {name!r} has the dtype {spec.dtype} ({kind}), {of_model} has {wanted.dtype} ({wanted_kind}). "
                "Send it as the checkpoint stores it; floats may be of any width."
            )

    def _check_range(self, name: str, weight: PackedWeight, bucket: Bucket) -> None:
        """Raises WeightsError for finite values that would be infinite in the engines.

        Not for scalars, which are constants, or scales that engines keep in float32.
        """
        dtype = weight.spec.dtype
        target = self._model.dtype or self._model.weights[self._model.tied.get(name, name)].dtype
        largest = overflow(dtype, bucket[weight.begin : weight.end], target) if weight.spec.shape else None
        if largest is not None:
            raise WeightsError(
                f"weight {name!r} has values of magnitude {largest:g} in {dtype}; the engines hold it in {target}, up "
                f"to {MAX_FINITE[target]:g}: they would become infinite. Start the service with an engine_args.dtype "
                "of larger range, or train within this one."
            )

    def _unknown(self, name: str) -> str:
        some = ", ".join(sorted(self._required)[:2])
        remedy = find_remedy(name, REMEDIES, "Use the names of get_state_keys().")
        return f"the model has no weight {name!r}; it has, for example, {some}. {remedy}"

    def _compare_tied(self, bucket: Bucket, weights: Mapping[str, PackedWeight], tied: set[str]) -> None:
        """Compares tied names with their weights, as soon as both are there.

        Raises:
            WeightsError: their values differ.
        """
        for name in tied:
            own, target = weights[name], self._model.tied[name]
            values = bucket[own.begin : own.end]
            if target in weights:
                held = weights[target]
                self._require_same(name, own.spec.dtype, values, held.spec.dtype, bucket[held.begin : held.end])
            elif target in self._places:
                earlier = np.frombuffer(self._stored(self.version.buckets[self._places[target]]), np.uint8)
                held = read_bucket(earlier)[target]
                self._require_same(name, own.spec.dtype, values, held.spec.dtype, earlier[held.begin : held.end])
            else:
                self._held[name] = _Held(own.spec.dtype, values.copy())
        for target in set(self._model.tied.values()) & weights.keys():
            own = weights[target]
            for name in [name for name in self._held if self._model.tied[name] == target]:
                early = self._held.pop(name)
                self._require_same(name, early.dtype, early.data, own.spec.dtype, bucket[own.begin : own.end])
            self._places[target] = len(self.version.buckets)

    def _require_same(self, name: str, dtype: str, data: Bucket, of_dtype: str, of_data: Bucket) -> None:
        if not _same_values(dtype, data, of_dtype, of_data):
            raise WeightsError(
                f"weight {name!r} differs from {self._model.tied[name]!r}, and the model has one weight for both "
                "(tie_word_embeddings). Send the trained one under both names, or leave the former out."
            )


def _same_values(dtype: str, data: Bucket, other_dtype: str, other: Bucket) -> bool:
    """Whether two weights of the same shape have the same values; bytes where their dtypes are the same."""
    if dtype == other_dtype:
        starts = range(0, len(data), CHUNK_BYTES)
        return all(data[i : i + CHUNK_BYTES].tobytes() == other[i : i + CHUNK_BYTES].tobytes() for i in starts)
    widen = FLOAT_READERS.keys() >= {dtype, other_dtype}
    return widen and np.array_equal(FLOAT_READERS[dtype](data), FLOAT_READERS[other_dtype](other), equal_nan=True)
