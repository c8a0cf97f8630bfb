"""Seeds of samples. They depend on the request's seed and on the indices of prompt and sample alone."""

from __future__ import annotations

_MASK = (1 << 64) - 1

SPACING = 1 << 20
"""Distance between the seeds of prompts, and so the maximum number of samples per prompt: sample i has the prompt's
seed + i."""


def prompt_seed(request_seed: int, prompt_index: int) -> int:
    """Seed of sample 0 of a prompt, in [0, 2**62); sample i has this + i.

    Two rounds of splitmix64 (Steele et al., 2014), so that requests with consecutive seeds share no random stream.
    """
    mixed = _splitmix(_splitmix(request_seed) ^ prompt_index)
    return (mixed & ((1 << 62) - 1)) // SPACING * SPACING


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
