"""64 prompts of 8 samples of 64 tokens, by `/sample` and by handle."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from benchmarks.gateway.workloads import Done, Endpoint, text
from twinkle_serve.gateway.native.tensors import read_samples
from twinkle_serve.sampler import RunningSampler

PROMPTS, SAMPLES, TOKENS = 64, 8, 64
PARAMS: Mapping[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0}


async def by_handle(sampler: RunningSampler, rng: random.Random) -> Done:
    """By handle, to arrays."""
    began = time.perf_counter()
    response = await sampler.sample_async(_inputs(rng), PARAMS, num_samples=SAMPLES)
    return _done(began, len(response.columns.tokens))


async def as_tensors(endpoint: Endpoint, rng: random.Random) -> Done:
    """By HTTP, to arrays."""
    began = time.perf_counter()
    data = await endpoint.http.post("/sample", _body(rng), "application/octet-stream")
    return _done(began, len(read_samples(data).columns.tokens))


async def as_json(endpoint: Endpoint, rng: random.Random) -> Done:
    """By HTTP, to lists."""
    began = time.perf_counter()
    answer = await endpoint.http.post_json("/sample", _body(rng))
    tokens = sum(len(sequence["tokens"]) for prompt in answer["prompts"] for sequence in prompt["sequences"])
    return _done(began, tokens)


FORMS: Mapping[str, Callable[[Endpoint, random.Random], Awaitable[Done]]] = {"tensors": as_tensors, "json": as_json}


def _inputs(rng: random.Random) -> list[dict[str, Any]]:
    return [{"text": text(rng)} for _ in range(PROMPTS)]


def _body(rng: random.Random) -> Mapping[str, Any]:
    return {"inputs": _inputs(rng), "sampling_params": PARAMS, "num_samples": SAMPLES}


def _done(began: float, tokens: int) -> Done:
    assert tokens == PROMPTS * SAMPLES * TOKENS
    return Done(1, tokens, [time.perf_counter() - began])
