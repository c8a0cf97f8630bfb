"""Samplers under test: each engine, in this process and as a service with dp_size 2."""

from __future__ import annotations

from typing import Any

from tests.support.deploy import deploy
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.groups import EngineKind
from twinkle_serve.sampler import RunningSampler, TorchSampler
from twinkle_serve.sampler.local import LocalClient

THINKING = {"reasoning_start_str": "?@A", "reasoning_end_str": "BC"}
"""As if the demo model thought."""
ENGINE_ARGS: dict[EngineKind, dict[str, Any]] = {
    "vllm": {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": 2**27,
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": 16,
        "reasoning_config": THINKING,
    },
    "torch": {"dtype": "float32", "max_model_len": 256, "max_lora_rank": 16, "reasoning_config": THINKING},
    "fake": {"max_model_len": 256},
}
KINDS: dict[str, EngineKind] = {
    "fake": "fake",
    "torch": "torch",
    "vllm": "vllm",
    "fake-service": "fake",
    "torch-service": "torch",
    "vllm-service": "vllm",
}
QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{b}="}]} for a, b in ((12, 34), (345, 67), (999, 1))]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


def make_sampler(which: str) -> RunningSampler:
    engine = KINDS[which]
    args: dict[str, Any] = {"engine": engine, "engine_args": ENGINE_ARGS[engine]}
    if which.endswith("service"):
        return deploy(which, device_mesh={"dp_size": 2}, **args)
    mesh = {"device_type": "cpu"}
    return RunningSampler(LocalClient(ServiceArgs.model_validate({"model_id": "demo", "device_mesh": mesh, **args})))


def tokens(response: SampleResponse) -> list[list[int]]:
    return [sequence.tokens for sequence in response.sequences]


class FakeSampler(TorchSampler):
    """As TorchSampler, on the fake engine: starts in a fraction of the time."""

    engine = "fake"  # type: ignore[assignment]  # a Literal there
