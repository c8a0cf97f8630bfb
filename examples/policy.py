"""The policy that the examples train: a model with its optimizer, published to a service from memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from twinkle_serve import InputFeature, hub
from twinkle_serve.sampler import RunningSampler

CLIP = (0.2, 0.28)
"""PPO's clip range, down and up: tokens whose probability ratio moved further get no gradient. Up is wider, so that
rare right answers can gain probability. Source: DAPO, arXiv 2503.14476."""
PARTS = 4
"""Parts of a batch that the model computes one after the other."""
IGNORED = -100


class Policy:
    """The model of a service, trained by policy gradients: all of its weights, or a LoRA adapter."""

    def __init__(
        self,
        sampler: RunningSampler,
        *,
        adapter: str = "",
        rank: int = 16,
        learning_rate: float,
        steps: int,
        inner_steps: int,
        seed: int,
    ) -> None:
        """
        Args:
            adapter: name of the adapter to train; "" for the model's own weights.
            learning_rate: of the first step; it falls to a tenth over `steps`.
            inner_steps: optimizer steps per step.
        """
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        self._sampler, self.adapter = sampler, adapter
        self._model = AutoModelForCausalLM.from_pretrained(
            hub.resolve(sampler.status()["model_id"]), dtype=torch.float32
        )
        self._config = None
        if adapter:
            self._config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            self._model = get_peft_model(self._model, self._config)
        self._run = f"grpo-{time.time_ns():x}"
        self._weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._rate = torch.optim.lr_scheduler.LinearLR(self._optimizer, 1.0, 0.1, total_iters=steps)
        self._inner_steps = inner_steps
        self.version = 0
        """Number of the version that was published last."""

    def publish(self) -> float:
        """Publishes the current weights to the sampler. Returns the duration, seconds."""
        from peft import get_peft_model_state_dict

        started = time.perf_counter()
        if self._config is None:
            label = self._sampler.update_weights(self._model.state_dict(), f"{self._run}@{self.version + 1}")
        else:
            weights = get_peft_model_state_dict(self._model)
            label = self._sampler.add_adapter_to_model(self.adapter, self._config, state_dict=weights)
        self.version = number(label)
        return time.perf_counter() - started

    def optimize(self, batch: Mapping[str, Any], advantage: Any) -> tuple[float, float]:
        """Takes optimizer steps on sampled tokens.

        Args:
            batch: `input_ids`, `attention_mask`, `labels` and `logprobs` as tensors, a row for each sample.
            advantage: a tensor with the advantage of each label, or with one column of each row's.

        Returns:
            Mean |Δlogprob| of the sampled tokens between trainer and sampler before the first optimizer step, and
            between the first and the last one.
        """
        import torch

        labels, old = batch["labels"], batch["logprobs"]
        mask = labels != IGNORED
        advantage = advantage.expand_as(old)
        lengths = batch["attention_mask"].sum(1)
        parts = lengths.argsort().chunk(PARTS)
        first = None
        for _ in range(self._inner_steps):
            new = torch.zeros_like(old)
            self._optimizer.zero_grad()
            for rows in parts:  # of similar lengths: little padding
                at = rows[:, None], torch.arange(int(lengths[rows].max()))[None]
                logits = self._model(
                    input_ids=batch["input_ids"][at], attention_mask=batch["attention_mask"][at]
                ).logits
                logprobs = logits.log_softmax(-1).gather(-1, labels[at].clamp(min=0)[..., None])[..., 0]
                ratio = (logprobs - old[at]).exp()
                gain = torch.minimum(ratio * advantage[at], ratio.clamp(1 - CLIP[0], 1 + CLIP[1]) * advantage[at])
                (-gain[mask[at]].sum() / mask.sum()).backward()
                new[at] = logprobs.detach()
            first = new if first is None else first
            torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
            self._optimizer.step()
        self._rate.step()
        return float((first - old)[mask].abs().mean()), float((new - first)[mask].abs().mean())


def turn_column(labels: Any, turns: Sequence[Sequence[float]]) -> Any:
    """Returns a value for each label, of the turn that it is in: 0 where there is no label.

    Args:
        labels: a row for each conversation; the labels of a turn are consecutive.
        turns: a value for each sampled turn of each conversation.
    """
    import torch

    sampled = (labels != IGNORED).long()
    begins = torch.diff(sampled, prepend=torch.zeros_like(sampled[:, :1])) == 1
    most = max(map(len, turns))
    values = torch.tensor([[0.0, *row, *[0.0] * (most - len(row))] for row in turns])
    return values.gather(1, begins.cumsum(1)) * sampled


def batch_of(features: Sequence[InputFeature]) -> dict[str, Any]:
    """Returns training inputs as tensors, padded on the right."""
    import torch

    width = max(len(feature["input_ids"]) for feature in features)

    def padded(key: str, fill: float, dtype: Any) -> Any:
        rows = [list(feature.get(key) or []) for feature in features]  # type: ignore[attr-defined]
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)

    lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
    return {
        "input_ids": padded("input_ids", 0, torch.long),
        "labels": padded("labels", IGNORED, torch.long),
        "logprobs": padded("logprobs", 0.0, torch.float32),
        "attention_mask": (torch.arange(width)[None] < lengths[:, None]).long(),
    }


def advantages(rewards: Sequence[float]) -> list[float] | None:
    """Returns the advantages of a group by its own mean and deviation; None if all rewards are equal."""
    mean = sum(rewards) / len(rewards)
    deviation = (sum((value - mean) ** 2 for value in rewards) / len(rewards)) ** 0.5
    return [(value - mean) / deviation for value in rewards] if deviation else None


def number(label: str) -> int:
    """Returns the number of a version."""
    return int(label.rpartition("@")[2])
