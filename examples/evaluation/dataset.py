"""The held-out sums of the demo model, for the tasks of lm-eval beside this file and for by_handle.py."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # lm-eval loads this file by its path

from sums import problems

COUNT = 500


END = "<|im_end|>"
"""Text of the token that ends an answer."""


def rows(count: int = COUNT) -> list[dict[str, Any]]:
    """Returns held-out problems, always the same ones, each with four answers of which one is right."""
    drawn = problems(random.Random(1), count, held_out=True)
    return [
        {"question": question, "answer": answer, "choices": _choices(int(answer), i % 4), "right": i % 4}
        for i, (question, answer) in enumerate(drawn)
    ]


def _choices(answer: int, right: int) -> list[str]:
    """Returns the answer, at an index, among wrong ones that differ in one digit, or by a carry."""
    numbers = [answer + 1, answer - 10, answer + 100]
    numbers.insert(right, answer)
    return [f"{number}{END}" for number in numbers]


def load(**_: Any) -> dict[str, Any]:
    """Returns the splits that lm-eval reads."""
    from datasets import Dataset

    return {"test": Dataset.from_list(rows())}
