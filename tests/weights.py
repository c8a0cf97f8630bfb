"""Versions of a model's own weights that matter, for tests, and what they say of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twinkle_serve import hub
from twinkle_serve.checkpoint import named_tensors


def changed_weights(seed: int, model: Path = hub.DEMO, scale: float = 0.3) -> dict[str, Any]:
    """The model's weights with noise on each, enough that every logprob differs."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in named_tensors(model):
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        weights[name] = (tensor + scale * noise).to(tensor.dtype)
    return weights


class Reference:
    """transformers in float32, given weights and adapters by hand: nothing of ours."""

    def __init__(self, model: Path = hub.DEMO) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._own = dict(named_tensors(model))
        self._base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._made: dict[tuple[int, str], Any] = {}

    def logprobs(
        self, weights: dict[str, Any] | None, ids: Sequence[int], adapter: Path | None = None
    ) -> np.ndarray[Any, Any]:
        """Log p of each token after the first. Shape [len(ids) - 1]."""
        import torch

        key = (id(weights), str(adapter))
        if key not in self._made:
            state = dict(self._own if weights is None else weights)
            make = type(self._base).from_pretrained
            model = make(None, config=self._base.config, state_dict=state, dtype=torch.float32).eval()
            if adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, adapter).eval()
            self._made[key] = (model, weights)  # the weights too: an id is another's once its object is gone
        model, _ = self._made[key]
        with torch.no_grad():
            logits = model(torch.tensor([list(ids)])).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].numpy()
