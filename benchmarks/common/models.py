"""Models to measure with, and new weights for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, TypeAlias

from twinkle_serve import hub
from twinkle_serve.weights.patches import BLOCK_BYTES

Tensors: TypeAlias = dict[str, Any]
"""torch tensors, by name."""


def large_model(directory: Path, dtype: str = "float32") -> Tensors:
    """Saves a random model of 0.2 billion parameters, 0.9 GB in float32, to a directory. Returns its weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=13,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (hub.DEMO / name).exists():
            shutil.copy(hub.DEMO / name, directory)
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def noisy(weights: Tensors) -> Tensors:
    """Returns new weights of the same model."""
    import torch

    return {name: tensor + 0.01 * torch.randn_like(tensor) * tensor.std() for name, tensor in weights.items()}


def sparsely_changed(weights: Tensors, share: float) -> Tensors:
    """Returns copies of which a share of the blocks, as deltas of weights have them, differ in one value each."""
    import torch

    changed = {}
    for name, tensor in weights.items():
        flat = tensor.clone().view(-1)
        values = BLOCK_BYTES // tensor.element_size()
        firsts = torch.arange(0, len(flat), values)
        flat[firsts[torch.rand(len(firsts)) < share]] += 0.01
        changed[name] = flat.view(tensor.shape)
    return changed
