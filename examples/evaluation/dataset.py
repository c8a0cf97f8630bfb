"""The held-out sums of the demo model, for the tasks of lm-eval beside this file and for by_handle.py."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # lm-eval loads this file by its path

from sums import problems

COUNT = 500


def rows(count: int = COUNT) -> list[dict[str, str]]:
    """Returns held-out problems, always the same ones."""
    drawn = problems(random.Random(1), count, held_out=True)
    return [{"question": question, "answer": answer} for question, answer in drawn]


def load(**_: Any) -> dict[str, Any]:
    """Returns the splits that lm-eval reads."""
    from datasets import Dataset

    return {"test": Dataset.from_list(rows())}
