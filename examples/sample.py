"""Asks the running service for sums, several answers each, and prints which answers are right.

scripts/serve                          # in one terminal
.venv/bin/python examples/sample.py    # in another
"""

from __future__ import annotations

import argparse
import random
import re

import twinkle_serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="sampler", help="the application's name in the config")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    trajectories, truths = [], []
    for _ in range(args.prompts):
        a, b, plus = rng.randint(10, 999), rng.randint(10, 999), rng.random() < 0.5
        content = f"{a}+{b}=" if plus else f"{a}-{b}="
        trajectories.append({"messages": [{"role": "user", "content": content}], "user_data": content})
        truths.append(str(a + b if plus else a - b))

    try:
        sampler = twinkle_serve.connect(args.name)
    except twinkle_serve.TwinkleServeError as error:
        raise SystemExit(f"{error}") from None
    params = twinkle_serve.SamplingParams(max_tokens=16, temperature=1.0, seed=args.seed)
    right = total = 0
    for response in sampler.sample_iter(trajectories, params, num_samples=args.samples, progress=True):
        question, truth = trajectories[response.prompt_index]["user_data"], truths[response.prompt_index]
        for sequence in response.sequences:
            # The last number of the text: models other than the demo say more than that.
            answer = (re.findall(r"-?\d+", sequence.decoded) or [""])[-1]
            logprob = float(sequence.logprob_array.sum())
            verdict = "right" if answer == truth else f"wrong, it is {truth}"
            print(f"{question:>9}{answer:<6} logprob {logprob:7.3f}  {sequence.engine}  {verdict}")
            right += answer == truth
            total += 1
    print(f"{right} of {total} right")


if __name__ == "__main__":
    main()
