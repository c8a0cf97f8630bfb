"""Test versions of a model's own weights, and their logprobs of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twinkle_serve import hub
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.data_format.response import SampledSequence


def changed_weights(seed: int, model: Path = hub.DEMO, scale: float = 0.3) -> dict[str, Any]:
    """The model's weights with noise on each, enough that every logprob differs."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in named_tensors(model):
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        weights[name] = (tensor + scale * noise).to(tensor.dtype)
    return weights


def differences(model: Any, sequences: Sequence[SampledSequence]) -> list[np.ndarray[Any, Any]]:
    """|Δlogprob| of each token of each sequence, where a transformers model scores them in one batch."""
    import torch

    whole = [[*s.response.prompts[int(s.response.columns.group[s.row])].tolist(), *s.tokens] for s in sequences]
    ids = torch.zeros((len(whole), max(map(len, whole))), dtype=torch.long)
    for row, tokens in enumerate(whole):  # padded behind, where causal attention does not look
        ids[row, : len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].numpy()
    return [
        np.abs(logprobs[row, len(tokens) - 1 - len(s.tokens) : len(tokens) - 1] - s.logprob_array)
        for row, (tokens, s) in enumerate(zip(whole, sequences, strict=True))
    ]


class Reference:
    """An independent reference: transformers in float32."""

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
        array: np.ndarray[Any, Any] = (
            logits.log_softmax(-1).gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].numpy()
        )
        return array
