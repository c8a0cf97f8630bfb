"""vllm and torch agree on other architectures: base model and LoRA, in float32, on tiny random models."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.harness import started
from tests.support.lora import ATTENTION, LINEAR, save_adapter
from twinkle_serve import SampleResponse, hub
from twinkle_serve.adapters import read_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.nightly]
TOLERANCE = 1e-3
PROMPTS = [np.random.default_rng(length).integers(3, 260, length) for length in (5, 17, 40)]
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.08,
}
MIXTURE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "head_dim": 32,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "qwen2": ("Qwen2Config", {}, LINEAR),
    "qwen3": ("Qwen3Config", {"head_dim": 32}, LINEAR),
    "llama": ("LlamaConfig", {"head_dim": 32}, LINEAR),
    "qwen3_moe": ("Qwen3MoeConfig", MIXTURE, ATTENTION),
}
"""transformers' config class, its keys beyond SIZES, and the modules of the adapter."""


def random_model(path: Path, config_class: str, sizes: dict[str, Any]) -> Path:
    """Saves a model of this architecture with random weights and the demo model's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SIZES, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers initialises them to 0, which would hide a missing one
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(hub.DEMO / name, path)
    return path


async def answers_of(architecture: str, path: Path) -> list[list[SampleResponse]]:
    """Returns the answers of base model and adapter on vllm, and on torch."""
    config_class, sizes, modules = ARCHITECTURES[architecture]
    model = random_model(path / "model", config_class, sizes)
    files = read_adapter(save_adapter(path / "lora", model=model, rank=8, modules=modules))
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "prompt_logprobs": 0}
    answers = []
    for kind in ("vllm", "torch"):
        async with started(kind, model) as engine:
            adapter = await engine.add("lora", files)
            answers.append([await engine.sample(PROMPTS, adapter=which, **options) for which in (None, adapter)])
    return answers


@pytest.fixture(scope="module")
async def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[SampleResponse]]]:
    """By architecture. Two start at a time, since a starting vLLM engine uses one core."""
    at_a_time = asyncio.Semaphore(2)

    async def one(architecture: str) -> list[list[SampleResponse]]:
        async with at_a_time:
            return await answers_of(architecture, tmp_path_factory.mktemp(architecture))

    return dict(zip(ARCHITECTURES, await asyncio.gather(*map(one, ARCHITECTURES)), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_vllm_and_torch_agree(architecture: str, answers: dict[str, list[list[SampleResponse]]]) -> None:
    """The same greedy tokens, and logprobs and prompt logprobs that differ by less than 1e-3; base and adapter."""
    vllm, torch = answers[architecture]
    for one, other in zip(vllm, torch, strict=True):
        assert one.columns.tokens.tolist() == other.columns.tokens.tolist()
        assert np.abs(one.columns.logprobs - other.columns.logprobs).max() < TOLERANCE  # type: ignore[operator]
        for i in range(len(PROMPTS)):
            scores = [response.columns.scores[i].logprobs[1:] for response in (one, other)]
            assert np.abs(scores[0] - scores[1]).max() < TOLERANCE
    base, lora = vllm
    assert base.columns.tokens.tolist() != lora.columns.tokens.tolist(), "the adapter changed nothing"
