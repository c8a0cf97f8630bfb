"""Fixtures of several modules, and Hypothesis without deadlines: how long an example takes depends on other load."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.eventually import eventually
from tests.support.failing_service import Service
from tests.support.local_sampler import make
from tests.support.lora import save_adapter
from twinkle_serve.sampler import RunningSampler

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture
def sampler() -> Iterator[RunningSampler]:
    """A sampler in this process, on the fake engine."""
    made, _ = make()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories of two adapters."""
    directory = tmp_path_factory.mktemp("adapters")
    return [save_adapter(directory / str(i), seed=i) for i in range(2)]


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    """Two engines in this process that fail as they are told."""
    monkeypatch.setattr("twinkle_serve.timing.PROBE_PERIOD_S", 0.05)
    made = Service(stall_timeout_s=0.3)
    await made.start()
    yield made
    await eventually(made.idle)
    await made.stop()
