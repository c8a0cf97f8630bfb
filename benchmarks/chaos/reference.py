"""transformers in float32, which scores samples under the versions that they name. Nothing of the service's own."""

from __future__ import annotations

import random
from collections.abc import Iterable

from benchmarks.chaos.checks import Answered, Finding, by_versions
from benchmarks.chaos.publisher import BASE, AdapterMaker, History
from tests.support.weights import changed_weights, differences
from twinkle_serve import SampledSequence, hub
from twinkle_serve.checkpoint import named_tensors

AGREES = 1e-3
"""Most |Δlogprob|, nats, of a token under the versions that it names."""
ROWS = 64
"""Sequences in a batch."""


class Reference:
    """Scores the samples of a run."""

    def __init__(self, history: History) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(hub.DEMO, dtype=torch.float32).eval()
        self._history = history
        self._adapters = AdapterMaker()
        self.samples, self.tokens, self.largest = 0, 0, 0.0
        """Samples and tokens that were scored, and the largest |Δlogprob| of those that agree, nats."""

    def check(self, calls: Iterable[Answered], share: float, rng: random.Random) -> list[Finding]:
        """What does not agree, of a share of the samples that is drawn by `rng`."""
        findings = []
        for (base, adapter), found in sorted(by_versions(calls).items()):
            drawn = sorted((pair for pair in found if rng.random() < share), key=lambda pair: len(pair[1].tokens))
            if drawn:
                findings += self._check(drawn, base, adapter)
        return findings

    def _check(self, drawn: list[tuple[Answered, SampledSequence]], base: str, adapter: str) -> list[Finding]:
        index = self._history.base(base)
        seeds = [attempt.seed for attempt in self._history.adapter(adapter)] if adapter else [None]
        if index is None or not seeds:
            return []  # labels of nothing are found elsewhere
        remaining = [(answered, sequence, float("inf")) for answered, sequence in drawn]
        for seed in seeds:  # more than one where an answer was lost, and it is not known which attempt it was
            self._load(self._history.attempts[BASE][index].seed, seed)
            remaining = self._not_agreeing(remaining, base)
        return [
            answered.finding("mislabelled", f"{sequence!r} is not of {base!r} with {adapter!r}: |Δlogprob| {worst:.4f}")
            for answered, sequence, worst in remaining
        ]

    def _not_agreeing(
        self, samples: list[tuple[Answered, SampledSequence, float]], base: str
    ) -> list[tuple[Answered, SampledSequence, float]]:
        others = []
        for at in range(0, len(samples), ROWS):
            part = samples[at : at + ROWS]
            found = differences(self._model, [sequence for _, sequence, _ in part])
            for (answered, sequence, before), difference in zip(part, found, strict=True):
                of_base = [difference[s.start : s.end] for s in sequence.weight_versions if s.version == base]
                worst = max(float(values.max(initial=0.0)) for values in of_base)
                if worst < AGREES:
                    self.samples += 1
                    self.tokens += sum(map(len, of_base))
                    self.largest = max(self.largest, worst)
                else:
                    others.append((answered, sequence, min(before, worst)))
        return others

    def _load(self, base: int | None, adapter: int | None) -> None:
        """Gives the model the weights of these seeds, the adapter's added by the formula of LoRA."""
        weights = dict(named_tensors(hub.DEMO)) if base is None else changed_weights(base)
        if adapter is not None:
            config, tensors = self._adapters.config, self._adapters.made(adapter)
            for name, up in tensors.items():
                if ".lora_B." in name:
                    module = name.removeprefix("base_model.model.").split(".lora_B.")[0]
                    down = tensors[name.replace(".lora_B.", ".lora_A.")]
                    key = f"{module}.weight"
                    weights[key] = weights[key] + (config.lora_alpha / config.r) * up @ down
        self._model.load_state_dict(weights, strict=False)
