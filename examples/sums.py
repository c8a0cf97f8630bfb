"""The task of the demo model: sums and differences, their answers, and which of them are never trained on."""

from __future__ import annotations

import random


def problem(rng: random.Random, fewest_digits: int = 2) -> tuple[str, str]:
    """Draws a question and its answer, the operands of `fewest_digits` to three digits each."""
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for digits in rng.choices(range(fewest_digits, 4), k=2))
    return (f"{a}+{b}=", str(a + b)) if rng.random() < 0.5 else (f"{a}-{b}=", str(a - b))


def is_held_out(question: str) -> bool:
    """Whether a problem is never trained on: one in sixteen, by its text only, so that others can reproduce it."""
    return sum(question.encode()) % 16 == 0


def problems(rng: random.Random, count: int, *, held_out: bool, fewest_digits: int = 2) -> list[tuple[str, str]]:
    """Draws questions with their answers, from the training or the held-out problems."""
    drawn: list[tuple[str, str]] = []
    while len(drawn) < count:
        candidate = problem(rng, fewest_digits)
        if is_held_out(candidate[0]) == held_out:
            drawn.append(candidate)
    return drawn


def reward(answer: str, truth: str) -> float:
    """Returns 1 for the right answer; up to 0.5 for correct digits, since most wrong answers have one wrong digit."""
    if answer == truth:
        return 1.0
    same = sum(a == b for a, b in zip(reversed(answer), reversed(truth), strict=False))
    return 0.5 * same / max(len(answer), len(truth), 1)
