"""A seed gives the same tokens wherever and however its samples are sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from tests.support.eventually import eventually
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.engines.fake import FakeEngine
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import EngineDeadError
from twinkle_serve.routing.policies import POLICIES
from twinkle_serve.routing.router import Router
from twinkle_serve.routing.seeds import SPACING, content_seed, occurrences
from twinkle_serve.weights import LocalStore, WeightStore

PROMPTS = [{"input_ids": [i, 20, 21]} for i in range(24, 41)]
OPTIONS: dict[str, Any] = {"max_tokens": 12, "seed": 11, "ignore_eos": True}
SAMPLES = 5


@asynccontextmanager
async def router(
    engines: int, policy: str = "balanced", slots: int = 4, token_latency_s: float = 0.0
) -> AsyncIterator[Router]:
    """Over so many engines in this process, of so few slots that groups are cut and wait."""
    store = LocalStore(WeightStore("demo"))
    args = {"max_model_len": 64, "max_num_seqs": slots, "token_latency_s": token_latency_s}
    servers = {
        name: EngineServer(FakeEngine(name, str(hub.DEMO), args), hub.DEMO, store)
        for name in (f"e{number}" for number in range(engines))
    }
    for name, server in servers.items():
        await server.start(name, 30)
    made = Router(
        ServiceArgs.model_validate({"model_id": "demo", "engine": "fake", "policy": policy}), hub.DEMO, servers, store
    )
    await made.start()

    async def all_ready() -> bool:
        return all(engine["state"] == "ready" for engine in (await made.status())["engines"].values())

    await eventually(all_ready)
    yield made
    made.close()
    for server in servers.values():
        await server.stop()


def same(response: SampleResponse, reference: SampleResponse) -> bool:
    return bool(
        response.columns.tokens.tolist() == reference.columns.tokens.tolist()
        and response.columns.seed.tolist() == reference.columns.seed.tolist()
    )


@pytest.fixture(scope="module")
async def reference() -> SampleResponse:
    """One engine that has room for all."""
    async with router(1, slots=512) as one:
        return await one.sample(PROMPTS, OPTIONS, num_samples=SAMPLES)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engines", [1, 2, 4])
async def test_seed_gives_the_same_tokens_for_any_number_of_engines_and_policy(
    reference: SampleResponse, engines: int, policy: str
) -> None:
    """Whole and cut groups, sent at once or late."""
    async with router(engines, policy) as several:
        response = await several.sample(PROMPTS, OPTIONS, num_samples=SAMPLES)
        assert same(response, reference)
        assert len(set(response.columns.engine)) == engines


async def test_seed_gives_the_same_tokens_when_an_engine_ends(reference: SampleResponse) -> None:
    """What it had is sampled elsewhere from the start."""
    async with router(2, token_latency_s=0.005) as two:
        parts = two.sample_iter(PROMPTS, OPTIONS, num_samples=SAMPLES)
        responses = [await anext(parts)]
        pool, membership = two._scheduler, two._engines

        async def busy() -> bool:
            return any(pool.sequences_of(name) for name in membership.active)

        await eventually(busy)
        name = next(name for name in membership.active if pool.sequences_of(name))
        membership.lose(membership.active[name], EngineDeadError("killed"))
        responses += [response async for response in parts]
    by_prompt = {part.prompt_index: part for response in responses for part in response}
    assert sorted(by_prompt) == list(range(len(PROMPTS)))
    for index, part in by_prompt.items():
        assert same(part, reference[index])


async def test_other_calls_and_other_prompts_have_other_streams() -> None:
    """The same prompt twice in a call, calls of neighbouring seeds, and calls without a seed: none repeats another."""
    prompt = {"input_ids": [24, 20, 21]}
    async with router(2) as two:
        options = {**OPTIONS, "max_tokens": 20}
        calls = [
            two.sample([prompt] * 8, options, num_samples=4),
            two.sample([prompt] * 8, {**options, "seed": 12}, num_samples=4),
            *(two.sample([prompt] * 8, {**options, "seed": None}, num_samples=4) for _ in range(3)),
        ]
        responses = await asyncio.gather(*calls)
    seen = [tuple(seq.tokens) for response in responses for seq in response.sequences]
    assert len(set(seen)) == len(seen) == 5 * 8 * 4


def test_seeds_by_content_stay_what_they_are() -> None:
    """Ids, their order and their number decide; the values are part of the interface."""
    ids = np.array([3, 1, 2], np.int32)
    assert [content_seed(7, ids, k) for k in (0, 1)] == [3800103414987227136, 2929344663931322368]
    assert content_seed(7, ids.astype(np.int64).astype(np.int32), 0) == content_seed(7, ids, 0)
    others = {content_seed(7, np.array(other, np.int32), 0) for other in ([3, 2, 1], [3, 1], [3, 1, 2, 0])}
    assert len(others | {content_seed(7, ids, 0), content_seed(8, ids, 0)}) == 5
    assert content_seed(2**62 - 1, ids, 3) % SPACING == 0
    assert occurrences([ids, ids[:1], ids, ids.copy()]) == [0, 0, 1, 2]
