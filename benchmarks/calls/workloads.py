"""The workloads, each the same for every way. A workload returns the number of its tokens and the seconds of calls."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.calls.ways import Job, Way

PROMPT_TOKENS = 20
"""Length of a prompt, in tokens of printable characters."""


@dataclass(slots=True)
class Work:
    """Work that was done."""

    tokens: int = 0
    samples: int = 0
    seconds_of_calls: list[float] = field(default_factory=list)

    async def call(self, way: Way, job: Job) -> list[list[int]]:
        """Samples one prompt and records it."""
        began = time.perf_counter()
        samples = await way.sample(job)
        self.seconds_of_calls.append(time.perf_counter() - began)
        assert [len(tokens) for tokens in samples] == [job.tokens] * job.samples
        self.tokens += job.tokens * job.samples
        self.samples += job.samples
        return samples


def prompts(count: int, rng: random.Random) -> list[list[int]]:
    """Random prompts, so that the prefix cache gives nothing."""
    return [[rng.randrange(32, 127) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


async def single(way: Way, rng: random.Random, *, calls: int = 1000, at_a_time: int = 64, tokens: int = 16) -> Work:
    """Calls of one sample each, many at a time."""
    work = Work()
    rest: Iterator[list[int]] = iter(prompts(calls, rng))

    async def caller() -> None:
        for ids in rest:
            await work.call(way, Job(ids=ids, tokens=tokens))

    await asyncio.gather(*(caller() for _ in range(at_a_time)))
    return work


async def alone(way: Way, rng: random.Random) -> Work:
    """Calls of one sample, one after the other."""
    return await single(way, rng, calls=50, at_a_time=1)


async def conversations(way: Way, rng: random.Random) -> Work:
    """32 conversations of 6 turns: each prompt is the one before, its sample and new tokens."""
    work = Work()

    async def conversation(ids: list[int]) -> None:
        for _ in range(6):
            (tokens,) = await work.call(way, Job(ids=ids, tokens=32))
            ids = [*ids, *tokens, *prompts(1, rng)[0]]

    await asyncio.gather(*map(conversation, prompts(32, rng)))
    return work


async def adapters(way: Way, rng: random.Random, *, names: Sequence[str]) -> Work:
    """64 prompts of 4 samples, each with one of the adapters, in a call for each prompt."""
    work = Work()
    jobs = [Job(ids=ids, tokens=32, samples=4, adapter=names[i % len(names)]) for i, ids in enumerate(prompts(64, rng))]
    await asyncio.gather(*(work.call(way, job) for job in jobs))
    return work


async def tailed(way: Way, rng: random.Random) -> Work:
    """128 prompts of 4 samples of 8 to 256 tokens, by Pareto: in one call where the way has such calls."""
    lengths = [min(256, int(8 * rng.paretovariate(1.1))) for _ in range(128)]
    jobs = [Job(ids=ids, tokens=n, samples=4) for ids, n in zip(prompts(128, rng), lengths, strict=True)]
    began = time.perf_counter()
    sampled = await way.sample_all(jobs)
    wanted = [[job.tokens] * 4 for job in jobs]
    assert [[len(tokens) for tokens in samples] for samples in sampled] == wanted
    return Work(4 * sum(lengths), 4 * len(jobs), [time.perf_counter() - began])


async def batch(way: Way, rng: random.Random) -> Work:
    """64 prompts of 8 samples, in one call where the way has such calls."""
    jobs = [Job(ids=ids, tokens=64, samples=8) for ids in prompts(64, rng)]
    began = time.perf_counter()
    sampled = await way.sample_all(jobs)
    assert all(len(tokens) == 64 for samples in sampled for tokens in samples)
    return Work(64 * 8 * 64, 64 * 8, [time.perf_counter() - began])
