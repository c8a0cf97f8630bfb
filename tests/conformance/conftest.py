"""One engine of each kind for the whole suite, on the demo model in float32."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.harness import EngineHarness, started
from tests.support.lora import save_adapter
from tests.support.samplers import make_sampler
from tests.support.transfer_plugin import TCP, write_plugin
from twinkle_serve import hub
from twinkle_serve.sampler import RunningSampler


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> None:
    """Of torch in this process: several gain nothing on so small a model, and spin where cores are scarce."""
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
async def vllm_engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineHarness]:
    """With a backend of weight transfers; see `tests.support.tcp_transfer`."""
    plugin = tmp_path_factory.mktemp("plugin")
    write_plugin(plugin)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(plugin)  # which vLLM's processes have too
        starting = started("vllm", weight_transfer_config={"backend": TCP})
        harness = await starting.__aenter__()
    yield harness
    await starting.__aexit__(None, None, None)


@pytest.fixture(scope="package")
async def torch_engine() -> AsyncIterator[EngineHarness]:
    async with started("torch") as harness:
        yield harness


@pytest.fixture(scope="package")
async def fake_engine() -> AsyncIterator[EngineHarness]:
    async with started("fake") as harness:
        yield harness


@pytest.fixture(params=["fake", "torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest) -> EngineHarness:
    """Each engine in turn."""
    harness: EngineHarness = request.getfixturevalue(f"{request.param}_engine")
    return harness


@pytest.fixture(
    scope="package",
    params=[
        "fake",
        "torch",
        pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.nightly]),
        pytest.param("fake-service", marks=pytest.mark.ray),
        pytest.param("torch-service", marks=[pytest.mark.ray, pytest.mark.nightly]),
        pytest.param("vllm-service", marks=[pytest.mark.ray, pytest.mark.vllm]),
    ],
)
def sampler(request: pytest.FixtureRequest) -> Iterator[RunningSampler]:
    """Each engine, each way of running it."""
    shared = request.param == "vllm-service"
    if request.param.endswith("service"):
        request.getfixturevalue("cluster")
    sampler = request.getfixturevalue("vllm_service") if shared else make_sampler(request.param)
    yield sampler
    assert not sampler.status()["requests"], "a test left requests running"
    if not shared:
        sampler.shutdown()


@pytest.fixture
def prompts() -> list[np.ndarray]:
    """Sums of several lengths, as the demo model's template renders them."""
    from twinkle_serve.template import Template

    template = Template(hub.DEMO)
    questions = ["12+34=", "345-67=", "999+999=", "10-99=", "120+7=", "5+5="]
    return [template.encode([{"role": "user", "content": q}], None, "test") for q in questions]


@pytest.fixture(scope="package")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters in directories."""
    directory = tmp_path_factory.mktemp("adapters")
    return [save_adapter(directory / str(seed), seed=seed, scale=0.6) for seed in (1, 2)]


_names = (f"lora{i}" for i in itertools.count())


@pytest.fixture
def name() -> str:
    """A name that no other test has used."""
    return next(_names)
