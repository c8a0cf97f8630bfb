"""Calls that trainers make, and what they keep of each."""

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
"""Token ids of prompts are drawn between these."""
TIMEOUT_S = 240.0
"""Of a call. On two slow cores one that meets a hung engine, a killed router and a killed engine takes over 120 s."""

REFERENCES = 2
REFERENCE_SHARE = 0.3
"""Of the calls repeat one of REFERENCES calls that every trainer makes: same seed, so the same tokens. Few and often:
only what is of the same versions can be compared, and versions last for seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a trainer asks for."""

    prompts: tuple[tuple[int, ...], ...]
    num_samples: int
    max_tokens: int
    ignore_eos: bool
    """Every sample has exactly max_tokens."""
    seed: int | None
    adapter: str
    """Its name; "" is the base model."""
    iterated: bool
    """By sample_iter."""
    reference: int | None = None
    """Number of the call that is repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A call is about to be made."""

    number: int
    """Of the call among its trainer's."""
    call: Call
    at: float
    """Seconds, time.monotonic: one clock for all processes of a machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A call has returned or raised."""

    number: int
    at: float
    responses: list[SampleResponse]
    """One of `sample`; of `sample_iter` each in the order of its arrival, those before an error too."""
    error: str = ""
    """Name of what was raised; "" if nothing was."""
    message: str = ""


def draw(rng: random.Random) -> Call:
    """The next call. Sizes are drawn by their logarithm: most calls are small, and all sizes come."""
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
    """A seeded call that is the same whoever draws it; each trainer may make it in either way."""
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
    """Distinct for all that matters: a prompt that comes back in another's place is seen."""
    return tuple(tuple(rng.randrange(*PROMPT_IDS) for _ in range(rng.randint(*PROMPT_TOKENS))) for _ in range(count))


def _log_uniform(rng: random.Random, least: int, most: int) -> int:
    return min(most, int(least * math.exp(rng.random() * math.log((most + 1) / least))))


def recorded(path: Path) -> Iterator[Begun | Ended]:
    """What a trainer kept. Its last record may be torn, where it was killed as it wrote it."""
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                return
