"""LoRA adapters with weights that matter, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinkle_serve import hub

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def random_adapter(
    model: Path = hub.DEMO, *, seed: int = 0, rank: int = 8, modules: tuple[str, ...] = LINEAR, scale: float = 0.3
) -> Any:
    """A peft model whose adapter changes the output: both halves are random; peft initializes one to 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules)))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                width = parameter.shape[1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / width**0.5)
    return peft


def save_adapter(path: Path, **options: Any) -> Path:
    """Such an adapter in a directory, as peft saves it."""
    random_adapter(**options).save_pretrained(path)
    return path
