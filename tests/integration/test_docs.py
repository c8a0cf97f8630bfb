"""The calls of README and docs run as they stand, against a service with the fake engine."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.deploy import deployed
from tests.support.docs import PAGES, SERVICE, Block, blocks_of
from tests.support.lora import random_adapter
from tests.support.weights import changed_weights
from twinkle_serve import TorchSampler

BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.runs == SERVICE]


class Model:
    """What the examples call a model."""

    def state_dict(self) -> dict[str, Any]:
        return changed_weights(1)


pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def service(cluster: None) -> Iterator[None]:
    with deployed("sampler", engine="fake", device_mesh={"dp_size": 2}):
        yield


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_example_runs_against_a_service(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the names that pages leave open, such as `trajectories`; a `rollout` that a page defines is called."""
    from peft import LoraConfig, get_peft_model_state_dict

    monkeypatch.setattr(TorchSampler, "engine", "fake")
    trajectories = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in (12, 345)]
    names: dict[str, Any] = {"__name__": "__main__", "trajectories": trajectories, "model": Model()}
    if "state_dict=state_dict" in block.code:
        names["lora_config"] = LoraConfig(r=8, target_modules=["q_proj"])
        names["state_dict"] = get_peft_model_state_dict(random_adapter(modules=("q_proj",)))
    exec(compile(block.code, str(block), "exec"), names)
    if inspect.iscoroutinefunction(rollout := names.get("rollout")):
        assert len(asyncio.run(rollout(trajectories)).sequences) == 4 * len(trajectories)
