"""Versions that are published while trainers sample, and what is known of each afterwards."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.calls import ADAPTERS
from tests.support.lora import random_adapter
from tests.support.weights import changed_weights
from twinkle_serve.data_format.weights import INITIAL_LABEL
from twinkle_serve.sampler.service import ServiceSampler

BASE = ""
"""The name that attempts to publish the model's own weights have."""
RANK = 8
UPDATE_TIMEOUT_S = 120.0


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt to publish a version. One that raised may have come to pass all the same: its answer was lost."""

    name: str
    seed: int | None
    """Of the weights; None is the model's own files."""
    label: str = ""
    """What it was published as. Of the model's own weights it is ours to choose, so it is known before."""
    begun_at: float
    published_at: float | None = None
    """When the service said so."""
    error: str = ""

    @property
    def number(self) -> int:
        """The version's."""
        return int(self.label.rpartition("@")[2])


@dataclass(slots=True)
class History:
    """Every attempt of a run, by name, in their order. One at a time is made."""

    attempts: dict[str, list[Attempt]] = field(
        default_factory=lambda: {
            BASE: [Attempt(name=BASE, seed=None, label=INITIAL_LABEL, begun_at=0.0, published_at=0.0)],
            **{name: [] for name in ADAPTERS},
        }
    )

    def base(self, label: str) -> int | None:
        """Which attempt a version of the model's own weights is of; None: nobody made such a version."""
        return next((i for i, attempt in enumerate(self.attempts[BASE]) if attempt.label == label), None)

    def adapter(self, label: str) -> list[Attempt]:
        """Attempts that a version of an adapter may be of; none: nobody made such a version.

        Attempts whose answers were lost, and their repetitions, take numbers that nobody was told: those between two
        known ones are of the attempts between, or of the later one itself, made more than once.
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
        """Index of the newest attempt that was published by then; None: there was none."""
        known = [i for i, a in enumerate(self.attempts[name]) if a.published_at is not None and a.published_at <= at]
        return known[-1] if known else None

    def errors(self) -> Counter[str]:
        return Counter(a.error for attempts in self.attempts.values() for a in attempts if a.error)


class AdapterMaker:
    """Adapters of the demo model with random weights, each the same for the same seed."""

    def __init__(self) -> None:
        from peft import get_peft_model_state_dict

        adapter = random_adapter(rank=RANK)
        self.config = adapter.peft_config["default"]
        self._shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapter).items()}

    def made(self, seed: int) -> dict[str, Any]:
        """Tensors by name. Large enough that every version says something else."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in self._shapes.items()}


class Publisher(threading.Thread):
    """Updates the model's own weights every period, and one adapter and the other by turns every other time."""

    def __init__(self, sampler: ServiceSampler, history: History, period_s: float) -> None:
        super().__init__(name="publisher", daemon=True)
        self._sampler, self._history, self._period_s = sampler, history, period_s
        self._adapters = AdapterMaker()
        self._end = threading.Event()
        self._seeds = itertools.count(1)
        for name in ADAPTERS:  # before anybody asks for them
            self._publish_adapter(name)

    def run(self) -> None:
        for turn in itertools.count():
            if self._end.wait(self._period_s):
                return
            self._update_base()
            if turn % 2:
                self._publish_adapter(ADAPTERS[turn // 2 % len(ADAPTERS)])

    def stop(self, timeout_s: float) -> bool:
        """Whether it has ended."""
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
