"""One engine of each kind for the whole suite, on the demo model in float32."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from tests.conformance.harness import EngineHarness
from twinkle_serve import hub
from twinkle_serve.engines import EngineKind, build_engine

ENGINE_ARGS: dict[EngineKind, dict[str, object]] = {
    "vllm": {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 64, "kv_cache_memory_bytes": 2**27},
    "torch": {"dtype": "float32", "max_model_len": 256},
    "fake": {"max_model_len": 256},
}


async def started(kind: EngineKind) -> AsyncIterator[EngineHarness]:
    engine = build_engine(
        kind, f"{kind}-under-test", str(hub.DEMO), ENGINE_ARGS[kind], cpus=[(0,)] if kind == "vllm" else []
    )
    await engine.start()
    harness = EngineHarness(engine)
    yield harness
    assert not harness.unfinished, "a test left groups running"
    await engine.stop()


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


@pytest.fixture
def prompts() -> list[np.ndarray]:
    """Sums of several lengths, as the demo model's template renders them."""
    from twinkle_serve.template import Template

    template = Template(hub.DEMO)
    questions = ["12+34=", "345-67=", "999+999=", "10-99=", "120+7=", "5+5="]
    return [template.encode([{"role": "user", "content": q}], None, "test") for q in questions]
