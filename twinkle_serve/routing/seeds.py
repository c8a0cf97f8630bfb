"""Seeds of samples. They depend on the request's seed, the index of the sample, and either the index of the prompt or
its tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1

SPACING = 1 << 20
"""Distance between the seeds of prompts, and so the maximum number of samples per prompt: sample i has the prompt's
seed + i."""


def prompt_seed(request_seed: int, prompt_index: int) -> int:
    """Seed of sample 0 of a prompt, in [0, 2**62); sample i has this + i.

    Two rounds of splitmix64 (Steele et al., 2014), so that requests with consecutive seeds share no random stream.
    """
    return _spaced(_splitmix(_splitmix(request_seed) ^ prompt_index))


def content_seed(request_seed: int, ids: NDArray[np.int32], occurrence: int) -> int:
    """Seed of sample 0 of a prompt by its token ids, as `prompt_seed` by its index.

    Args:
        ids: shape [P].
        occurrence: number of earlier prompts of the call with the same ids.
    """
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest()
    mixed = _splitmix(_splitmix(request_seed) ^ int.from_bytes(digest, "little"))
    return _spaced(_splitmix(mixed ^ occurrence))


def occurrences(prompts: Iterable[NDArray[np.int32]]) -> list[int]:
    """Returns, for each prompt, how many earlier ones have the same ids."""
    seen = Counter[bytes]()
    counts = []
    for ids in prompts:
        key = ids.tobytes()
        counts.append(seen[key])
        seen[key] += 1
    return counts


def _spaced(mixed: int) -> int:
    return (mixed & ((1 << 62) - 1)) // SPACING * SPACING


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
