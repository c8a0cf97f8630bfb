"""Calls per second, and CPU per prompt."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from ray import serve

from benchmarks.common.cpu_time import Round, cpu_ms, measured
from benchmarks.common.report import Figures, quartiles
from benchmarks.router.one_by_one import OneByOne, OneEngine
from benchmarks.router.service import engine_args, prompts_of, started
from twinkle_serve import InputFeature, SamplingParams

AT_A_TIME = 64


async def calls(options: argparse.Namespace) -> Figures:
    """Calls per second through the service and through the reference, in turn."""
    sampler = await started("sampler", options.engine, engine_args(options))
    one_by_one: Any = OneByOne
    one_engine: Any = OneEngine
    graph = one_by_one.bind(one_engine.bind(options.engine, engine_args(options)))
    reference = await asyncio.to_thread(serve.run, graph, name="reference", route_prefix=None)
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True)

    async def through_service(prompt: InputFeature) -> None:
        response = await sampler.sample_async(prompt, params, num_samples=options.samples)
        assert len(response.sequences) == options.samples

    async def through_reference(prompt: InputFeature) -> None:
        samples = await reference.sample.remote(prompt["input_ids"], params, options.samples)
        assert len(samples) == options.samples

    ways = {"service": through_service, "reference": through_reference}
    rounds: list[dict[str, Round]] = []
    for number in range(options.rounds + 1):
        prompts = prompts_of(options.calls if number else AT_A_TIME, number)
        pair: dict[str, Round] = {}
        for way in list(ways) if number % 2 else list(ways)[::-1]:
            pair[way] = await measured(_each(prompts, ways[way]))
        if number:  # the first round warms both up
            rounds.append(pair)
            print(f"round {number}: {pair['service'].seconds:.2f} s, reference {pair['reference'].seconds:.2f} s")
    await asyncio.to_thread(serve.delete, "reference")
    await asyncio.to_thread(serve.delete, "sampler")
    ratios = [pair["reference"].seconds / pair["service"].seconds for pair in rounds]
    return {
        "calls_per_s": {
            way: round(options.calls / statistics.median(pair[way].seconds for pair in rounds), 1) for way in rounds[0]
        },
        "ratio": {**quartiles(ratios), "all": [round(ratio, 2) for ratio in ratios]},
        "cpu_ms_per_call": {way: cpu_ms([pair[way] for pair in rounds], options.calls) for way in rounds[0]},
    }


async def _each(prompts: Sequence[InputFeature], call: Callable[[InputFeature], Awaitable[None]]) -> int:
    """Calls with each prompt, AT_A_TIME at a time. Returns their number."""
    rest: Iterator[InputFeature] = iter(prompts)

    async def worker() -> None:
        for prompt in rest:
            await call(prompt)

    await asyncio.gather(*(worker() for _ in range(AT_A_TIME)))
    return len(prompts)


async def cpu(options: argparse.Namespace) -> Figures:
    """CPU per prompt in calls of 64 prompts of 8 samples: `alike`, all of one length, the cheapest case; and `apart`,
    of different lengths (16 tokens of the vocabulary end a sample), so that samples return a few at a time."""
    sampler = await started("sampler", options.engine, engine_args(options))
    repeats, figures = 4, {}
    ways: dict[str, dict[str, Any]] = {
        "alike": {"max_tokens": options.tokens, "ignore_eos": True},
        "apart": {"max_tokens": 200, "stop": list(range(32, 48))},
    }

    async def work(seed: int, params: dict[str, Any]) -> int:
        for number in range(repeats):
            await sampler.sample_async(prompts_of(64, seed + number), params, num_samples=8)
        return repeats * 64

    for way, params in ways.items():
        rounds = [await measured(work(1000 + repeats * number, params)) for number in range(options.rounds + 1)][1:]
        figures[way] = {
            "seconds_per_call": round(statistics.median(r.seconds for r in rounds) / repeats, 3),
            "ms_per_prompt": cpu_ms(rounds, repeats * 64),
            "ms_per_sample": cpu_ms(rounds, repeats * 64 * 8),
            "router_ms_per_prompt": quartiles([r.cpu_s["router replica"] / repeats / 64 * 1e3 for r in rounds]),
        }
    await asyncio.to_thread(serve.delete, "sampler")
    return figures
