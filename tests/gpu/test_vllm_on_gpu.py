"""vLLM on a GPU, as a service: behaviour that only a GPU shows.

GPU_TESTS_EAGER=1 leaves out CUDA graphs, and with them a minute of the engine's start.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
import torch

from tests.support.deploy import deploy
from tests.support.ray_cluster import ray_cluster
from twinkle_serve.sampler import RunningSampler

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(300),
]
ENGINE_ARGS = {
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 2**32,
    "enable_sleep_mode": True,
    "enforce_eager": os.environ.get("GPU_TESTS_EAGER") == "1",
}
PROMPTS = [{"input_ids": [20 + i, 21, 22, 23]} for i in range(32)]
GREEDY = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True}


@pytest.fixture(scope="module")
def sampler() -> Iterator[RunningSampler]:
    with ray_cluster(num_cpus=8):
        yield deploy("gpu", engine="vllm", device_mesh={"device_type": "auto"}, engine_args=ENGINE_ARGS)


def used_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def test_auto_takes_the_gpu(sampler: RunningSampler) -> None:
    (engine,) = sampler.status()["engines"].values()
    assert engine["device"] == "cuda"
    response = sampler.sample(PROMPTS, {"max_tokens": 64, "ignore_eos": True}, num_samples=8)
    assert [len(seq.tokens) for seq in response.sequences] == [64] * 256
    assert used_mib() > 4096


def test_the_same_seed_gives_the_same_tokens(sampler: RunningSampler) -> None:
    first, again = (sampler.sample(PROMPTS[:4], {"max_tokens": 32, "seed": 7}, num_samples=4) for _ in range(2))
    assert [seq.tokens for seq in first.sequences] == [seq.tokens for seq in again.sequences]
    assert len({tuple(seq.tokens) for seq in first.sequences[:4]}) > 1


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_the_memory_back_and_wakes_with_the_same_weights(sampler: RunningSampler, level: int) -> None:
    before = sampler.sample(PROMPTS, GREEDY)
    awake = used_mib()
    sampler.sleep(level)
    assert used_mib() < awake - 3500
    sampler.wake_up()
    after = sampler.sample(PROMPTS, GREEDY)
    assert [seq.tokens for seq in after.sequences] == [seq.tokens for seq in before.sequences]
