"""The calls of README and docs run as they stand, against a service with the fake engine, by handle and over HTTP."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.deploy import deployed
from tests.support.docs import HTTP, PAGES, SERVICE, Block, blocks_of
from tests.support.gateway import gateway_url
from tests.support.lora import random_adapter
from tests.support.weights import changed_weights
from twinkle_serve import TorchSampler

BLOCKS = [block for page in PAGES for block in blocks_of(page)]

HOST = "localhost:8000"
"""Host and port of the gateway in examples."""

CURL = 'curl() { command curl --fail-with-body --max-time 60 "$@" && echo; }\n'
"""Curl that fails where the gateway answers with an error."""


class Model:
    """What the examples call a model."""

    def state_dict(self) -> dict[str, Any]:
        return changed_weights(1)


pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def service(cluster: None) -> Iterator[None]:
    with deployed("sampler", engine="fake", device_mesh={"dp_size": 2}):
        yield


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.runs == SERVICE], ids=str)
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


@pytest.fixture(scope="module")
def url(service: None) -> Iterator[str]:
    with gateway_url() as url:
        yield url


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.runs == HTTP], ids=str)
def test_example_runs_over_http(block: Block, url: str) -> None:
    """Lines of curl in a shell, which ends at the first that the gateway refuses, and Python, at the gateway's URL."""
    code = block.code.replace(HOST, url.removeprefix("http://"))
    if block.language == "python":
        exec(compile(code, str(block), "exec"), {"__name__": "__main__"})
        return
    shell = subprocess.run(["bash", "-euc", CURL + code], capture_output=True, text=True, timeout=120)
    assert shell.returncode == 0, shell.stdout + shell.stderr
    assert shell.stdout.strip()
