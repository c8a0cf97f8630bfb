"""Computes by handle what lm-eval computes over HTTP: both read the same weights through the same template.

.venv/bin/python examples/evaluation/by_handle.py
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from dataset import COUNT, rows

from twinkle_serve import connect
from twinkle_serve.sampler import RunningSampler

END = "<|im_end|>"


def exact_match(sampler: RunningSampler, drawn: list[dict[str, str]]) -> float:
    """Returns the share of right greedy answers."""
    prompts = [{"messages": [{"role": "user", "content": row["question"]}]} for row in drawn]
    response = sampler.sample(prompts, {"max_tokens": 8, "temperature": 0})
    texts = [sequence.decoded for sequence in response.sequences]
    return sum(text == row["answer"] for text, row in zip(texts, drawn, strict=True)) / len(drawn)


def likelihoods(sampler: RunningSampler, drawn: list[dict[str, str]]) -> tuple[float, float]:
    """Returns the perplexity of a right answer, and the share of right answers that greedy decoding would give."""
    prompts: list[Any] = [{"messages": [{"role": "user", "content": row["question"]}]} for row in drawn]
    contexts = sampler.encode(prompts)
    answers = sampler.encode([{"text": row["answer"] + END, "add_special_tokens": False} for row in drawn])
    inputs = [{"input_ids": [*context, *answer]} for context, answer in zip(contexts, answers, strict=True)]
    total, greedy = 0.0, 0
    for scored, context in zip(sampler.score(inputs, top_logprobs=1), contexts, strict=True):
        assert scored.prompt_logprobs is not None and scored.topk_prompt_logprobs is not None
        logprobs: list[Any] = scored.prompt_logprobs[len(context) :]
        likeliest: list[Any] = scored.topk_prompt_logprobs[len(context) :]
        total += sum(logprobs)
        greedy += all(value == best[0][1] for value, best in zip(logprobs, likeliest, strict=True))
    return math.exp(-total / len(drawn)), greedy / len(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", default="sampler", help="name of the application")
    arguments = parser.parse_args()
    sampler = connect(arguments.service)
    drawn = rows(COUNT)
    perplexity, greedy = likelihoods(sampler, drawn)
    figures = {
        "sums": {"exact_match": exact_match(sampler, drawn)},
        "sums_likelihood": {"perplexity": perplexity, "acc": greedy},
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
