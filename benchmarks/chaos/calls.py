"""Calls that trainers make, and their records of each."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twinkle_serve import SampleResponse

ADAPTERS = ("left", "right")
MAX_PROMPTS, MAX_SAMPLES = 32, 8
TOKENS = (16, 160)
PROMPT_TOKENS = (4, 24)
PROMPT_IDS = (10, 250)
"""Range of the prompts' token ids."""
TIMEOUT_S = 240.0
"""Deadline of a call. On two slow cores, a call that meets a hung engine, a killed router and a killed engine takes
over 120 s."""

REFERENCES = 2
REFERENCE_SHARE = 0.3
"""Share of the calls that repeat one of REFERENCES calls, which all trainers make: same seed, so the same tokens. Few
and often, since only samples of the same versions can be compared, and versions last for seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One sampling call of a trainer."""

    prompts: tuple[tuple[int, ...], ...]
    num_samples: int
    max_tokens: int
    ignore_eos: bool
    """If set, every sample has exactly max_tokens."""
    seed: int | None
    adapter: str
    """Name of the adapter; "" for the base model."""
    iterated: bool
    """Whether it is made by sample_iter."""
    reference: int | None = None
    """Number of the repeated call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Record of a call that is about to be made."""

    number: int
    """Index of the call among its trainer's."""
    call: Call
    at: float
    """Seconds of time.monotonic, which all processes of a machine share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Record of a call that has returned or raised."""

    number: int
    at: float
    responses: list[SampleResponse]
    """One for `sample`; for `sample_iter` all in their order of arrival, including those before an error."""
    error: str = ""
    """Name of the exception's type; "" if none was raised."""
    message: str = ""


def draw(rng: random.Random) -> Call:
    """Draws the next call. Sizes are log-uniform: most calls are small, and all sizes occur."""
    if rng.random() < REFERENCE_SHARE:
        return reference(rng.randrange(REFERENCES), rng.choice((*ADAPTERS, "")))
    return Call(
        prompts=_prompts(rng, _log_uniform(rng, 1, MAX_PROMPTS)),
        num_samples=_log_uniform(rng, 1, MAX_SAMPLES),
        max_tokens=_log_uniform(rng, *TOKENS),
        ignore_eos=rng.random() < 0.8,
        seed=rng.randrange(2**62) if rng.random() < 0.3 else None,
        adapter=rng.choice((*ADAPTERS, "")),
        iterated=rng.random() < 0.4,
    )


def reference(number: int, adapter: str) -> Call:
    """Returns a seeded call that is the same for all trainers."""
    rng = random.Random(number)
    return Call(
        prompts=_prompts(rng, 3),
        num_samples=2,
        max_tokens=32,
        ignore_eos=True,
        seed=number,
        adapter=adapter,
        iterated=number % 2 == 1,
        reference=number,
    )


def _prompts(rng: random.Random, count: int) -> tuple[tuple[int, ...], ...]:
    """Draws prompts that are distinct for all practical purposes, so that swapped prompts are detected."""
    return tuple(tuple(rng.randrange(*PROMPT_IDS) for _ in range(rng.randint(*PROMPT_TOKENS))) for _ in range(count))


def _log_uniform(rng: random.Random, least: int, most: int) -> int:
    return min(most, int(least * math.exp(rng.random() * math.log((most + 1) / least))))


def recorded(path: Path) -> Iterator[Begun | Ended]:
    """Reads a trainer's records. The last one may be torn, if the trainer was killed while writing it."""
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                return
