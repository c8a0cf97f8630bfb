"""One engine of each kind for the whole suite, on the demo model in float32."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.harness import EngineHarness, Files
from tests.support.ray_cluster import ray_cluster
from tests.support.samplers import ENGINE_ARGS, KINDS, make_sampler
from twinkle_serve import hub
from twinkle_serve.engines import EngineKind, build_engine
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.sampler import RunningSampler


async def started(kind: EngineKind, model: Path = hub.DEMO) -> AsyncIterator[EngineHarness]:
    engine = build_engine(
        kind, f"{kind}-under-test", str(model), ENGINE_ARGS[kind], cpus=[(0,)] if kind == "vllm" else []
    )
    store: Any = Files()
    host = EngineServer(engine, model, store)
    await host.start(kind, 300)
    harness = EngineHarness(engine, host, store)
    yield harness
    assert not harness.unfinished, "a test left groups running"
    await host.stop()


@pytest.fixture(scope="package")
async def vllm_engine() -> AsyncIterator[EngineHarness]:
    async for harness in started("vllm"):
        yield harness


@pytest.fixture(scope="package")
async def torch_engine() -> AsyncIterator[EngineHarness]:
    async for harness in started("torch"):
        yield harness


@pytest.fixture(scope="package")
async def fake_engine() -> AsyncIterator[EngineHarness]:
    async for harness in started("fake"):
        yield harness


@pytest.fixture(params=["fake", "torch", "vllm"])
def engine(request: pytest.FixtureRequest) -> EngineHarness:
    """Each engine in turn."""
    harness: EngineHarness = request.getfixturevalue(f"{request.param}_engine")
    return harness


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    with ray_cluster(num_cpus=16):
        yield


@pytest.fixture(scope="package", params=list(KINDS))
def sampler(request: pytest.FixtureRequest) -> Iterator[RunningSampler]:
    """Each engine, each way of running it."""
    if request.param.endswith("service"):
        request.getfixturevalue("cluster")
    made = make_sampler(request.param)
    yield made
    assert not made.status()["requests"], "a test left requests running"
    made.shutdown()


@pytest.fixture
def prompts() -> list[np.ndarray]:
    """Sums of several lengths, as the demo model's template renders them."""
    from twinkle_serve.template import Template

    template = Template(hub.DEMO)
    questions = ["12+34=", "345-67=", "999+999=", "10-99=", "120+7=", "5+5="]
    return [template.encode([{"role": "user", "content": q}], None, "test") for q in questions]
