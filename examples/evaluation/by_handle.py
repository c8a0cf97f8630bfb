"""Computes by handle what lm-eval computes over HTTP: both read the same weights through the same template.

.venv/bin/python examples/evaluation/by_handle.py
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from dataset import COUNT, rows

from twinkle_serve import Trajectory, connect
from twinkle_serve.sampler import RunningSampler


def exact_match(sampler: RunningSampler, drawn: list[dict[str, Any]]) -> float:
    """Returns the share of right greedy answers."""
    response = sampler.sample(_prompts(drawn), {"max_tokens": 8, "temperature": 0})
    texts = [sequence.new_input_feature["messages"][-1]["content"] for sequence in response.sequences]
    return sum(text == row["answer"] for text, row in zip(texts, drawn, strict=True)) / len(drawn)


def right_choices(sampler: RunningSampler, drawn: list[dict[str, Any]]) -> float:
    """Returns the share of problems whose right answer is the likeliest of its choices."""
    contexts = sampler.encode(_prompts(drawn))
    answers = sampler.encode([{"text": text, "add_special_tokens": False} for row in drawn for text in row["choices"]])
    choices = len(drawn[0]["choices"])
    inputs = [{"input_ids": [*contexts[i // choices], *answer]} for i, answer in enumerate(answers)]
    likelihoods = []
    for i, scored in enumerate(sampler.score(inputs)):
        assert scored.prompt_logprobs is not None
        logprobs: list[Any] = scored.prompt_logprobs[len(contexts[i // choices]) :]
        likelihoods.append(sum(logprobs))
    right = 0
    for i, row in enumerate(drawn):
        group = likelihoods[i * choices : (i + 1) * choices]
        right += group.index(max(group)) == row["right"]
    return right / len(drawn)


def _prompts(drawn: list[dict[str, Any]]) -> list[Trajectory]:
    return [{"messages": [{"role": "user", "content": row["question"]}]} for row in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", default="sampler", help="name of the application")
    arguments = parser.parse_args()
    sampler = connect(arguments.service)
    drawn = rows(COUNT)
    figures = {"sums": exact_match(sampler, drawn), "sums_choice": right_choices(sampler, drawn)}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
