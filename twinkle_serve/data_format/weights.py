"""Versions of the model's own weights, and which of them sampled which tokens."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bucket: TypeAlias = NDArray[np.uint8]
"""Some weights as a safetensors file. Shape [bytes]."""

BucketArgument: TypeAlias = Bucket | list[Awaitable[Bucket]]
"""A bucket, or a list with one reference to it in Ray's object store. Ray does not fetch references inside lists, so
the bucket skips the processes that only pass it on."""

INITIAL_LABEL = "initial"
"""Label of the weights in the model's own files."""

PauseMode: TypeAlias = Literal["keep", "wait", "abort"]
"""What becomes of running samples in a pause. keep: they stand still, and go on afterwards. wait: they end first.
abort: they end where they are, with the tokens that they have."""

PAUSE_MODES: tuple[PauseMode, ...] = ("keep", "wait", "abort")

Spans: TypeAlias = tuple[tuple[str, int], ...]
"""Versions that sampled one sequence, in order: each one's label, and the first token that it sampled."""


class VersionSpan(NamedTuple):
    """Tokens of a sample that one version of the model's weights has sampled."""

    version: str
    start: int
    """Index of the first token."""
    end: int
    """Index behind the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsVersion:
    """One immutable version of the model's own weights."""

    label: str
    number: int
    """0 is the model's own files; each later version has a larger one."""
    buckets: tuple[str, ...] = ()
    """Checksum of each bucket that the store has of it; none of the model's own files."""
    size_bytes: int = 0


CHECKPOINT_VERSION = WeightsVersion(label=INITIAL_LABEL, number=0)
"""The model's own files."""
