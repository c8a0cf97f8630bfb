"""Versions of the model's own weights, and the tokens that each sampled."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

Bucket: TypeAlias = NDArray[np.uint8]
"""Some weights as a safetensors file. Shape [bytes]."""


@dataclass(frozen=True, slots=True)
class BucketFile:
    """A bucket in a file in memory, for other processes of the node, until its sender ends."""

    path: str

    def map(self) -> Bucket:
        """Returns the bucket without a copy. Raises FileNotFoundError if its sender is gone."""
        return np.memmap(self.path, np.uint8, "r")


BucketArgument: TypeAlias = Bucket | list[Awaitable[Bucket]] | BucketFile
"""A bucket, or where it is: a list with one reference to it in Ray's object store, or a file in memory. Ray does not
fetch references inside lists, so the bucket skips the processes that only pass it on."""

INITIAL_LABEL = "initial"
"""Label of the weights in the model's checkpoint."""

PauseMode: TypeAlias = Literal["keep", "wait", "abort"]
"""Treatment of running samples in a pause. keep: suspend them and continue afterwards. wait: let them finish first.
abort: end them early, with the tokens that they have."""

PAUSE_MODES: tuple[PauseMode, ...] = get_args(PauseMode)

Spans: TypeAlias = tuple[tuple[str, int], ...]
"""Versions that sampled one sequence, in order: label, and index of the first token, of each."""


class VersionSpan(NamedTuple):
    """Tokens of a sample that one version of the model's weights sampled."""

    version: str
    """Label of the version."""
    start: int
    """Index of the first token."""
    end: int
    """Index after the last token."""


class SampledSpan(TypedDict):
    """Consecutive tokens of an InputFeature that were sampled, and the weights that sampled them."""

    weights: str
    """Label of the version of the model's own weights."""
    adapter: str
    """`name@version` of the adapter; "" for the base model."""
    start: int
    """Index in `input_ids` of the first token."""
    end: int
    """Index after the last token."""


class WeightSpec(NamedTuple):
    """Shape and dtype of one weight."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' name, such as BF16."""

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # of F8_E4M3, the 8
        return math.prod(self.shape) * (1 if bits is None else int(bits.group())) // (8 if bits else 1)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The weights of a model."""

    weights: Mapping[str, WeightSpec]
    """By name in the model's checkpoint; empty where it has no safetensors files."""
    tied: Mapping[str, str]
    """Other names of some weights, each with the weight whose values it has: an output layer that is the embedding."""
    dtype: str = ""
    """safetensors' name of the dtype that an engine converts floats to; "" if it keeps the checkpoint's."""

    @property
    def required(self) -> Mapping[str, WeightSpec]:
        """The weights that an update must have."""
        return {name: spec for name, spec in self.weights.items() if name not in self.tied}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsVersion:
    """One immutable version of the model's own weights."""

    label: str
    """Unique name given by the trainer."""
    number: int
    """0 for the model's checkpoint; larger for each later version."""
    buckets: tuple[str, ...] = ()
    """Checksum of each bucket in the store; empty for the model's checkpoint."""
    size_bytes: int = 0
    """Size of all buckets."""


MAIN_TRACK = "main"
"""The only track, where the config names none."""


@dataclass(frozen=True, slots=True)
class WeightsState:
    """All versions of a store."""

    current: Mapping[str, WeightsVersion]
    """Of each track that has had one; of others it is the checkpoint."""
    labels: list[str]
    """Of all versions that have been current, by number."""
    kept: list[str]
    """Labels of those that can be made current again, the oldest first."""


TransferCall: TypeAlias = Literal["init", "start", "update", "finish"]
"""A call of vLLM's weight transfer, to the engines that take weights from a trainer itself."""


class TransferTarget(NamedTuple):
    """An engine that takes weights from a trainer itself."""

    engine: str
    incarnation: str
    workers: int
    """Number of its processes that hold weights."""


class TransferOffer(NamedTuple):
    """The engines of a track, for a trainer that is to send weights to them itself."""

    targets: tuple[TransferTarget, ...]
    connection: int
    """Id of the update whose trainer they are connected to; 0 if they are not all connected to one."""


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """Weights that a trainer sends to engines itself, beside the store."""

    targets: tuple[TransferTarget, ...]
    """The engines; the workers of all are numbered in this order."""
    digests: Mapping[str, str]
    """Of each weight as it was sent to the store; see `weight_digest`."""


@dataclass(frozen=True, slots=True)
class TransferStep:
    """A trainer's call to every engine of a plan."""

    upload: int
    """Id of the update."""
    call: TransferCall
    info: Any
    """Argument of init and update, in the form of the transfer's backend."""
    targets: tuple[TransferTarget, ...]

    def workers(self, engine: str) -> range:
        """Returns the numbers of an engine's workers among those of all targets."""
        first = 0
        for target in self.targets:
            if target.engine == engine:
                return range(first, first + target.workers)
            first += target.workers
        raise KeyError(engine)


CHECKPOINT_VERSION = WeightsVersion(label=INITIAL_LABEL, number=0)
"""The model's checkpoint."""
