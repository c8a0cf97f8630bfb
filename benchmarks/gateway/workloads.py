"""The workloads, each the same for every server."""

from __future__ import annotations

import asyncio
import json
import random
import string
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from benchmarks.gateway.http import HTTPClient

PROMPT_CHARACTERS = 20
TOKENS = 16
"""Of a completion."""
STREAM_TOKENS = 64

Body: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server, as a client sees it."""

    http: HTTPClient
    model: str


@dataclass(slots=True)
class Done:
    """Work that was done."""

    requests: int = 0
    tokens: int = 0
    seconds_of_requests: list[float] = field(default_factory=list)
    seconds_to_first: list[float] = field(default_factory=list)
    """Of streams: to the first text."""


Workload: TypeAlias = Callable[[Endpoint, random.Random], Awaitable[Done]]


def text(rng: random.Random, characters: int = PROMPT_CHARACTERS) -> str:
    """Returns a random text, so that the prefix cache gives nothing."""
    return "".join(rng.choices(string.ascii_letters + string.digits, k=characters))


@dataclass(frozen=True, slots=True)
class Kind:
    """A protocol's path, and the part of a body that is its prompt."""

    path: str
    prompt: Callable[[random.Random], Body]
    has_text: Callable[[Body], bool]
    """Whether a choice of a chunk has text."""


COMPLETIONS = Kind(
    "/v1/completions",
    lambda rng: {"prompt": text(rng)},
    lambda choice: bool(choice["text"]),
)
CHAT = Kind(
    "/v1/chat/completions",
    lambda rng: {"messages": [{"role": "user", "content": text(rng)}]},
    lambda choice: bool(choice["delta"].get("content") or choice["delta"].get("reasoning")),
)


def body_of(kind: Kind, endpoint: Endpoint, rng: random.Random, tokens: int, **options: Any) -> Body:
    fixed = {"model": endpoint.model, "max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    return {**fixed, **kind.prompt(rng), **options}


async def whole(kind: Kind, endpoint: Endpoint, rng: random.Random, *, requests: int, at_a_time: int) -> Done:
    """Completions that are not streamed."""
    done = Done()
    rest = iter([body_of(kind, endpoint, rng, TOKENS) for _ in range(requests)])

    async def caller() -> None:
        for body in rest:
            began = time.perf_counter()
            answer = await endpoint.http.post_json(kind.path, body)
            done.seconds_of_requests.append(time.perf_counter() - began)
            assert answer["usage"]["completion_tokens"] == TOKENS, answer
            done.requests += 1
            done.tokens += TOKENS

    await asyncio.gather(*(caller() for _ in range(at_a_time)))
    return done


async def streamed(kind: Kind, endpoint: Endpoint, rng: random.Random, *, requests: int, at_a_time: int) -> Done:
    """Streams of completions."""
    done = Done()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    rest = iter([body_of(kind, endpoint, rng, STREAM_TOKENS, **options) for _ in range(requests)])

    async def caller() -> None:
        for body in rest:
            began, first, usage = time.perf_counter(), None, None
            async for data in endpoint.http.events(kind.path, body):
                if first is None or b'"usage":{' in data:
                    chunk = json.loads(data)
                    usage = chunk.get("usage") or usage
                    if first is None and any(map(kind.has_text, chunk["choices"])):
                        first = time.perf_counter() - began
            assert first is not None and usage is not None and usage["completion_tokens"] == STREAM_TOKENS, usage
            done.seconds_of_requests.append(time.perf_counter() - began)
            done.seconds_to_first.append(first)
            done.requests += 1
            done.tokens += STREAM_TOKENS

    await asyncio.gather(*(caller() for _ in range(at_a_time)))
    return done


async def batch(endpoint: Endpoint, rng: random.Random) -> Done:
    """One request of 64 prompts with 8 samples each."""
    body = {**body_of(COMPLETIONS, endpoint, rng, 64, n=8), "prompt": [text(rng) for _ in range(64)]}
    began = time.perf_counter()
    answer = await endpoint.http.post_json(COMPLETIONS.path, body)
    assert len(answer["choices"]) == 64 * 8 and answer["usage"]["completion_tokens"] == 64 * 8 * 64
    return Done(1, 64 * 8 * 64, [time.perf_counter() - began])


def _sized(run: Any, kind: Kind, requests: int, at_a_time: int) -> Workload:
    async def workload(endpoint: Endpoint, rng: random.Random) -> Done:
        done: Done = await run(kind, endpoint, rng, requests=requests, at_a_time=at_a_time)
        return done

    return workload


WORKLOADS: Mapping[str, Workload] = {
    "alone": _sized(whole, COMPLETIONS, 40, 1),
    "flight": _sized(whole, COMPLETIONS, 512, 64),
    "streams": _sized(streamed, COMPLETIONS, 96, 32),
    "batch": batch,
    "chat-alone": _sized(whole, CHAT, 40, 1),
    "chat-flight": _sized(whole, CHAT, 512, 64),
    "chat-streams": _sized(streamed, CHAT, 96, 32),
}
