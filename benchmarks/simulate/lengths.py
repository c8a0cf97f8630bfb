"""Lengths of samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LONGEST = 8192
SHAPES = ("log-normal", "reasoning")


def lengths_of(shape: str, count: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Draws sample lengths, in tokens.

    log-normal: median 400, sigma 1. reasoning: most end after hundreds, a quarter after thousands, and one in fifty
    hits the limit.
    """
    if shape == "log-normal":
        drawn = rng.lognormal(np.log(400), 1.0, count)
    else:
        kind = rng.random(count)
        drawn = np.where(kind < 0.75, rng.lognormal(np.log(500), 0.6, count), rng.lognormal(np.log(2500), 0.5, count))
        drawn = np.where(kind > 0.98, LONGEST, drawn)
    return np.clip(drawn, 1, LONGEST).astype(np.int32)
