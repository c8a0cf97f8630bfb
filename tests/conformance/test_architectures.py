"""vllm and torch say the same of other architectures: base model and LoRA, in float32, on tiny random models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance.conftest import started
from tests.lora import ATTENTION, LINEAR, save_adapter
from twinkle_serve import hub
from twinkle_serve.adapters import read_adapter

TOLERANCE = 1e-3
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
"""transformers' config, what it has beyond SIZES, and the modules of its adapter."""


def random_model(path: Path, config_class: str, sizes: dict[str, Any]) -> Path:
    """A model of that architecture with random weights and the demo model's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SIZES, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at 0, where nobody would miss them
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(hub.DEMO / name, path)
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_vllm_and_torch_agree(architecture: str, tmp_path: Path) -> None:
    """The same greedy tokens, and logprobs and prompt logprobs that differ by less than 1e-3."""
    config_class, sizes, modules = ARCHITECTURES[architecture]
    model = random_model(tmp_path / "model", config_class, sizes)
    files = read_adapter(save_adapter(tmp_path / "lora", model=model, rank=8, modules=modules))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 260, length) for length in (5, 17, 40)]
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "prompt_logprobs": 0}
    results = []
    for kind in ("vllm", "torch"):
        async for engine in started(kind, model):
            adapter = await engine.add("lora", files)
            results.append([await engine.sample(prompts, adapter=which, **options) for which in (None, adapter)])
    for one, other in zip(*results, strict=True):
        assert one.columns.tokens.tolist() == other.columns.tokens.tolist()
        assert np.abs(one.columns.logprobs - other.columns.logprobs).max() < TOLERANCE  # type: ignore[operator]
        for i in range(len(prompts)):
            scores = [response.columns.scores[i].logprobs[1:] for response in (one, other)]
            assert np.abs(scores[0] - scores[1]).max() < TOLERANCE
    base, lora = results[0]
    assert base.columns.tokens.tolist() != lora.columns.tokens.tolist(), "the adapter changed nothing"
