"""Publishes versions while trainers sample, and records each attempt."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.chaos.calls import ADAPTERS
from benchmarks.common.models import Tensors
from tests.support.lora import random_adapter
from tests.support.weights import changed_weights
from twinkle_serve.data_format.weights import INITIAL_LABEL
from twinkle_serve.sampler import RunningSampler

BASE = ""
"""Name under which attempts to publish the model's own weights are recorded."""
RANK = 8
UPDATE_TIMEOUT_S = 120.0


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt to publish a version. One that raised may have succeeded all the same, with its answer lost."""

    name: str
    seed: int | None
    """Seed of the weights; None for the model's own files."""
    label: str = ""
    """Version label. We choose the labels of the model's weights, so those are known in advance."""
    begun_at: float
    published_at: float | None = None
    """When the service confirmed it."""
    error: str = ""

    @property
    def number(self) -> int:
        """Number of the adapter version."""
        return int(self.label.rpartition("@")[2])


@dataclass(slots=True)
class History:
    """All attempts of a run by name, in order. They are made one at a time."""

    attempts: dict[str, list[Attempt]] = field(
        default_factory=lambda: {
            BASE: [Attempt(name=BASE, seed=None, label=INITIAL_LABEL, begun_at=0.0, published_at=0.0)],
            **{name: [] for name in ADAPTERS},
        }
    )

    def base(self, label: str) -> int | None:
        """Index of the attempt that a version of the model's weights belongs to; None if there is none."""
        return next((i for i, attempt in enumerate(self.attempts[BASE]) if attempt.label == label), None)

    def adapter(self, label: str) -> list[Attempt]:
        """Attempts that an adapter version may belong to; empty if there is none.

        Attempts with lost answers, and their retries, take numbers that were never reported: a number between two known
        ones belongs to an attempt between them, or to the later one, made more than once.
        """
        name, _, number = label.rpartition("@")
        if not number.isdigit() or name not in self.attempts:
            return []
        possible: list[Attempt] = []
        for attempt in self.attempts[name]:
            if not attempt.label:
                possible.append(attempt)
            elif attempt.number == int(number):
                return [attempt]
            elif attempt.number < int(number):
                possible = []
            else:
                return [*possible, attempt]
        return possible

    def current(self, name: str, at: float) -> int | None:
        """Index of the newest attempt that was published by then; None if there was none."""
        known = [i for i, a in enumerate(self.attempts[name]) if a.published_at is not None and a.published_at <= at]
        return known[-1] if known else None

    def errors(self) -> Counter[str]:
        return Counter(a.error for attempts in self.attempts.values() for a in attempts if a.error)


class AdapterMaker:
    """Adapters of the demo model with random weights, reproducible by seed."""

    def __init__(self) -> None:
        from peft import get_peft_model_state_dict

        adapter = random_adapter(rank=RANK)
        self.config = adapter.peft_config["default"]
        self._shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapter).items()}

    def made(self, seed: int) -> Tensors:
        """Returns tensors by name, large enough that every version has other logprobs."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in self._shapes.items()}


class Publisher(threading.Thread):
    """Updates the model's own weights every period, and every other time one of the adapters, in turn."""

    def __init__(self, sampler: RunningSampler, history: History, period_s: float) -> None:
        super().__init__(name="publisher", daemon=True)
        self._sampler, self._history, self._period_s = sampler, history, period_s
        self._adapters = AdapterMaker()
        self._end = threading.Event()
        self._seeds = itertools.count(1)
        for name in ADAPTERS:  # before trainers use them
            self._publish_adapter(name)

    def run(self) -> None:
        for turn in itertools.count():
            if self._end.wait(self._period_s):
                return
            self._update_base()
            if turn % 2:
                self._publish_adapter(ADAPTERS[turn // 2 % len(ADAPTERS)])

    def stop(self, timeout_s: float) -> bool:
        """Stops publishing. Returns whether it ended in time."""
        self._end.set()
        self.join(timeout_s)
        return not self.is_alive()

    def _update_base(self) -> None:
        seed = next(self._seeds)
        attempt = Attempt(name=BASE, seed=seed, label=f"step-{seed}", begun_at=time.monotonic())
        self._history.attempts[BASE].append(attempt)
        try:
            self._sampler.update_weights(changed_weights(seed), attempt.label, timeout_s=UPDATE_TIMEOUT_S)
            attempt.published_at = time.monotonic()
        except Exception as error:
            attempt.error = f"update_weights: {type(error).__name__}: {error}"

    def _publish_adapter(self, name: str) -> None:
        seed = next(self._seeds)
        attempt = Attempt(name=name, seed=seed, begun_at=time.monotonic())
        self._history.attempts[name].append(attempt)
        try:
            attempt.label = self._sampler.add_adapter_to_model(
                name, self._adapters.config, state_dict=self._adapters.made(seed)
            )
            attempt.published_at = time.monotonic()
        except Exception as error:
            attempt.error = f"add_adapter_to_model: {type(error).__name__}: {error}"
