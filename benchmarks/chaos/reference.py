"""Scores samples under the versions that label them."""

from __future__ import annotations

import random
from collections.abc import Iterable

from benchmarks.chaos.checks import Answered, Finding, by_versions
from benchmarks.chaos.publisher import BASE, History
from benchmarks.chaos.scorers import Scorer
from twinkle_serve import SampledSequence

AGREES = 1e-3
"""Largest |Δlogprob| of a token, nats, under the versions that label it."""
ROWS = 64
"""Sequences per batch."""


class Reference:
    """Scores the samples of a run."""

    def __init__(self, history: History, scorer: Scorer) -> None:
        self._history, self._scorer = history, scorer
        self.name = scorer.name
        self.samples, self.tokens, self.largest = 0, 0, 0.0
        """Scored samples and tokens, and the largest |Δlogprob| of those that agree, nats."""

    def check(self, calls: Iterable[Answered], share: float, rng: random.Random) -> list[Finding]:
        """Scores a share of the samples, drawn by `rng`. Returns the ones that do not agree."""
        findings = []
        for (base, adapter), found in sorted(by_versions(calls).items()):
            drawn = [pair for pair in found if rng.random() < share and pair[1].logprob_array is not None]
            drawn.sort(key=lambda pair: len(pair[1].tokens))
            if drawn:
                findings += self._check(drawn, base, adapter)
        return findings

    def _check(self, drawn: list[tuple[Answered, SampledSequence]], base: str, adapter: str) -> list[Finding]:
        index = self._history.base(base)
        seeds = [attempt.seed for attempt in self._history.adapter(adapter)] if adapter else [None]
        if index is None or not seeds:
            return []  # unknown labels are found elsewhere
        remaining = [(answered, sequence, float("inf")) for answered, sequence in drawn]
        for seed in seeds:  # several where an answer was lost and the attempt is unknown
            self._scorer.load(self._history.attempts[BASE][index].seed, seed)
            remaining = self._not_agreeing(remaining, base)
        return [
            answered.finding("mislabelled", f"{sequence!r} is not by {base!r} with {adapter!r}: |Δlogprob| {worst:.4f}")
            for answered, sequence, worst in remaining
        ]

    def _not_agreeing(
        self, samples: list[tuple[Answered, SampledSequence, float]], base: str
    ) -> list[tuple[Answered, SampledSequence, float]]:
        others = []
        for at in range(0, len(samples), ROWS):
            part = samples[at : at + ROWS]
            differences = self._scorer.differences([sequence for _, sequence, _ in part])
            for (answered, sequence, before), difference in zip(part, differences, strict=True):
                of_base = [difference[s.start : s.end] for s in sequence.weight_versions if s.version == base]
                worst = max(float(values.max(initial=0.0)) for values in of_base)
                if worst < AGREES:
                    self.samples += 1
                    self.tokens += sum(map(len, of_base))
                    self.largest = max(self.largest, worst)
                else:
                    others.append((answered, sequence, min(before, worst)))
        return others
