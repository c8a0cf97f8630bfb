"""GRPO against the running service: a trainer publishes its weights to the sampler from memory after every step.

    scripts/serve                                    # in one terminal
    .venv/bin/python examples/grpo.py --out /tmp/grpo          # in another: trains a LoRA adapter
    .venv/bin/python examples/grpo.py --out /tmp/grpo --full   # trains the model itself

Each step samples groups of answers to new problems from the newest version of the weights, rewards them, computes
their advantages within the group, and takes optimizer steps on them. Prints and records for each step the reward, the
staleness of the samples, and the difference between the trainer's and the sampler's logprobs: far from 0, the samples
would be from other weights than the trainer assumes. Ends with the greedy accuracy on held-out problems, before and
after, and a plot.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from policy import Policy, advantages, number
from ray.actor import ActorHandle
from sums import problems, reward

from twinkle_serve import SampledSequence, SampleResponse, SamplingParams, Trajectory, connect

ADAPTER = "policy"
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Step:
    """Metrics of a step; one line of metrics.jsonl."""

    step: int
    reward: float
    """Mean reward of the samples."""
    right: float
    """Share of right answers among the samples."""
    staleness: float
    """Mean number of versions published after the one that sampled."""
    logprob_difference: float
    """Mean |Δlogprob| of the sampled tokens between trainer and sampler, before the optimizer step, nats."""
    policy_change: float
    """Mean |Δlogprob| of the same tokens between the first and the last inner step. If the weights did not reach the
    engines, the next step's `logprob_difference` would be of this size."""
    groups_used: int
    """Number of groups whose answers had different rewards; the others have no gradient."""
    sample_s: float
    train_s: float
    publish_s: float


@ray.remote(num_cpus=0)  # the service has reserved all; the two take turns
class Trainer:
    """Holds the model, with a LoRA adapter unless `full`, and the optimizer."""

    def __init__(
        self, service: str, *, full: bool, rank: int, learning_rate: float, steps: int, inner_steps: int, seed: int
    ) -> None:
        self._sampler = connect(service)
        self._policy = Policy(
            self._sampler,
            adapter="" if full else ADAPTER,
            rank=rank,
            learning_rate=learning_rate,
            steps=steps,
            inner_steps=inner_steps,
            seed=seed,
        )
        self._policy.publish()

    def accuracy(self, drawn: Sequence[tuple[str, str]], *, temperature: float) -> float:
        """Share of problems with the right answer, sampled at a temperature."""
        params = {"max_tokens": ANSWER_TOKENS, "temperature": temperature, "seed": 0}
        response = self._sampler.sample(_prompts(drawn), params, self._policy.adapter)
        return sum(_answer(s) == truth for s, (_, truth) in zip(response.sequences, drawn, strict=True)) / len(drawn)

    def step(self, step: int, drawn: Sequence[tuple[str, str]], samples: int) -> Step:
        """Samples, rewards, optimizes and publishes once."""
        import torch

        started = time.perf_counter()
        params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=1.0, seed=step)
        response = self._sampler.sample(_prompts(drawn), params, self._policy.adapter, num_samples=samples)
        sampled = time.perf_counter()
        sequences, gains, rewards, right = [], [], [], 0
        for group, (_, truth) in zip(response, drawn, strict=True):
            gained = [reward(_answer(sequence), truth) for sequence in group.sequences]
            right += sum(_answer(sequence) == truth for sequence in group.sequences)
            rewards += gained
            if (group_advantages := advantages(gained)) is not None:
                sequences += group.sequences
                gains += group_advantages
        difference, change = 0.0, 0.0
        if sequences:
            difference, change = self._policy.optimize(
                SampleResponse(sequences).to_training_batch(), torch.tensor(gains)[:, None]
            )
        trained = time.perf_counter()
        # Each sample names its adapter's version, or the versions of the model's own weights.
        versions = [number(s.adapter or s.weight_versions[0].version) for s in response.sequences]
        staleness = self._policy.version - sum(versions) / len(versions)
        return Step(
            step=step,
            reward=sum(rewards) / len(rewards),
            right=right / len(rewards),
            staleness=staleness,
            logprob_difference=difference,
            policy_change=change,
            groups_used=len(sequences) // samples,
            sample_s=sampled - started,
            train_s=trained - sampled,
            publish_s=self._policy.publish(),
        )


def _prompts(drawn: Sequence[tuple[str, str]]) -> list[Trajectory]:
    return [{"messages": [{"role": "user", "content": question}]} for question, _ in drawn]


def _answer(sequence: SampledSequence) -> str:
    return str(sequence.new_input_feature["messages"][-1]["content"])


def train(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains; writes metrics.jsonl, summary.json and reward.png to `--out`. Returns the summary."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    connect(arguments.service)  # joins its cluster
    trainer = Trainer.remote(
        arguments.service,
        full=arguments.full,
        rank=arguments.rank,
        learning_rate=arguments.learning_rate,
        steps=arguments.steps,
        inner_steps=arguments.inner_steps,
        seed=arguments.seed,
    )
    held_out = problems(random.Random(1), arguments.held_out, held_out=True)
    rng = random.Random(arguments.seed)
    started = time.perf_counter()
    before, drawn_before = accuracies(trainer, held_out)
    print(f"held-out accuracy before: {before:.1%} of {len(held_out)} greedy, {drawn_before:.1%} at temperature 1")
    steps: list[Step] = []
    with (arguments.out / "metrics.jsonl").open("w") as metrics:
        for number in range(1, arguments.steps + 1):
            drawn = problems(rng, arguments.prompts, held_out=False)
            step: Step = ray.get(trainer.step.remote(number, drawn, arguments.samples))
            steps.append(step)
            metrics.write(json.dumps(asdict(step)) + "\n")
            if number % arguments.print_every == 0:
                print(
                    f"step {number:4d}  reward {_mean(steps[-arguments.print_every :], 'reward'):.3f}  "
                    f"right {_mean(steps[-arguments.print_every :], 'right'):.3f}  "
                    f"staleness {step.staleness:.2f}  |Δlogprob| {step.logprob_difference:.1e}  sample "
                    f"{step.sample_s:.2f} s  train {step.train_s:.2f} s  publish {step.publish_s:.2f} s",
                    flush=True,
                )
            if time.perf_counter() - started > arguments.time_limit_s:
                print(f"stopped after step {number}: --time-limit-s {arguments.time_limit_s:g} is reached")
                break
    after, drawn_after = accuracies(trainer, held_out)
    summary = {
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_at_temperature_1_before": drawn_before,
        "accuracy_at_temperature_1_after": drawn_after,
        "held_out_problems": len(held_out),
        "steps": len(steps),
        "seconds": round(time.perf_counter() - started, 1),
        "largest_logprob_difference": max(step.logprob_difference for step in steps),
        **{f"{phase}_mean": round(_mean(steps, phase), 4) for phase in ("sample_s", "train_s", "publish_s")},
    }
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(steps, summary, arguments.out / "reward.png")
    print(
        f"held-out accuracy after {len(steps)} steps, {summary['seconds']:.0f} s: "
        f"{after:.1%} greedy, was {before:.1%}; {drawn_after:.1%} at temperature 1, was {drawn_before:.1%}"
    )
    return summary


def accuracies(trainer: ActorHandle, drawn: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Accuracy of greedy answers, and of answers at temperature 1."""
    greedy, sampled = ray.get([trainer.accuracy.remote(drawn, temperature=temperature) for temperature in (0.0, 1.0)])
    return greedy, sampled


def _mean(steps: Sequence[Step], field: str) -> float:
    return float(sum(getattr(step, field) for step in steps) / len(steps))


def plot(steps: Sequence[Step], summary: dict[str, float], path: Path) -> None:
    """Plots the reward by step, and its mean over the last 20."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    numbers = [step.step for step in steps]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for field, label, color in (
        ("reward", "mean reward", "tab:blue"),
        ("right", "share of right answers", "tab:green"),
    ):
        smooth = [_mean(steps[max(0, i - 19) : i + 1], field) for i in range(len(steps))]
        axes.plot(numbers, [getattr(step, field) for step in steps], color=color, alpha=0.25)
        axes.plot(numbers, smooth, color=color, label=f"{label}, mean of 20 steps")
    axes.set(xlabel="step", ylim=(0, 1))
    axes.set_title(f"held-out greedy accuracy {summary['accuracy_before']:.1%} → {summary['accuracy_after']:.1%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", default="sampler", help="name of the application")
    parser.add_argument("--out", type=Path, required=True, help="directory for metrics and plot")
    parser.add_argument("--full", action="store_true", help="train the model itself, not an adapter")
    parser.add_argument("--steps", type=int, help="default 170, or 260 with --full, which samples faster")
    parser.add_argument("--prompts", type=int, default=64, help="problems per step")
    parser.add_argument("--samples", type=int, default=8, help="answers per problem")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, help="of the first step; falls to a tenth")
    parser.add_argument("--inner-steps", type=int, default=2, help="optimizer steps per step")
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--print-every", type=int, default=10)
    parser.add_argument("--time-limit-s", type=float, default=540.0)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    parsed.steps = parsed.steps or (260 if parsed.full else 170)
    parsed.learning_rate = parsed.learning_rate or (6e-4 if parsed.full else 1e-3)
    return parsed


if __name__ == "__main__":
    train(parse())
