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
from ray.actor import ActorHandle
from train_demo_model import is_held_out, problem

from twinkle_serve import SampledSequence, SampleResponse, SamplingParams, Trajectory, connect, hub

ADAPTER = "policy"
ANSWER_TOKENS = 8
CLIP = (0.2, 0.28)
"""PPO's clip range, down and up: tokens whose probability ratio moved further get no gradient. Up is wider, so that
rare right answers can gain probability. Source: DAPO, arXiv 2503.14476."""


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
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        self._sampler = connect(service)
        model = hub.resolve(self._sampler.status()["model_id"])
        self._policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._config = None
        self._adapter = ""
        if not full:
            self._config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            self._policy = get_peft_model(self._policy, self._config)
            self._adapter = ADAPTER
        self._run = f"grpo-{time.time_ns():x}"
        weights = [weight for weight in self._policy.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._rate = torch.optim.lr_scheduler.LinearLR(self._optimizer, 1.0, 0.1, total_iters=steps)
        self._inner_steps = inner_steps
        self._version = 0
        self._publish()

    def _publish(self) -> float:
        """Publishes the current weights to the sampler. Returns the duration, seconds."""
        from peft import get_peft_model_state_dict

        started = time.perf_counter()
        if self._config is None:
            label = self._sampler.update_weights(self._policy.state_dict(), f"{self._run}@{self._version + 1}")
        else:
            weights = get_peft_model_state_dict(self._policy)
            label = self._sampler.add_adapter_to_model(ADAPTER, self._config, state_dict=weights)
        self._version = _number(label)
        return time.perf_counter() - started

    def accuracy(self, drawn: Sequence[tuple[str, str]], *, temperature: float) -> float:
        """Share of problems with the right answer, sampled at a temperature."""
        params = {"max_tokens": ANSWER_TOKENS, "temperature": temperature, "seed": 0}
        response = self._sampler.sample(_prompts(drawn), params, self._adapter)
        return sum(_answer(s) == truth for s, (_, truth) in zip(response.sequences, drawn, strict=True)) / len(drawn)

    def step(self, number: int, drawn: Sequence[tuple[str, str]], samples: int) -> Step:
        """Samples, rewards, optimizes and publishes once."""
        started = time.perf_counter()
        params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=1.0, seed=number)
        response = self._sampler.sample(_prompts(drawn), params, self._adapter, num_samples=samples)
        sampled = time.perf_counter()
        sequences, advantages, rewards, right = [], [], [], 0
        for group, (_, truth) in zip(response, drawn, strict=True):
            gained = [reward(_answer(sequence), truth) for sequence in group.sequences]
            right += sum(_answer(sequence) == truth for sequence in group.sequences)
            rewards += gained
            mean = sum(gained) / samples
            deviation = (sum((value - mean) ** 2 for value in gained) / samples) ** 0.5
            if deviation:
                sequences += group.sequences
                advantages += [(value - mean) / deviation for value in gained]
        difference, change = self._optimize(sequences, advantages) if sequences else (0.0, 0.0)
        trained = time.perf_counter()
        # Each sample names its adapter's version, or the versions of the model's own weights.
        versions = [_number(s.adapter or s.weight_versions[0].version) for s in response.sequences]
        staleness = self._version - sum(versions) / len(versions)
        return Step(
            step=number,
            reward=sum(rewards) / len(rewards),
            right=right / len(rewards),
            staleness=staleness,
            logprob_difference=difference,
            policy_change=change,
            groups_used=len(sequences) // samples,
            sample_s=sampled - started,
            train_s=trained - sampled,
            publish_s=self._publish(),
        )

    def _optimize(self, sequences: Sequence[SampledSequence], advantages: Sequence[float]) -> tuple[float, float]:
        """Takes optimizer steps on the sampled tokens. Returns `logprob_difference` and `policy_change` of the step."""
        import torch

        batch = SampleResponse(sequences).to_training_batch()
        labels, mask, old = batch["labels"], batch["loss_mask"], batch["logprobs"]
        advantage = torch.tensor(advantages)[:, None]
        first = None
        for _ in range(self._inner_steps):
            logits = self._policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            new = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            first = new.detach() if first is None else first
            ratio = (new - old).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP[0], 1 + CLIP[1]) * advantage)
            loss = -gain[mask].mean()
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._policy.parameters(), 1.0)
            self._optimizer.step()
        self._rate.step()
        return float((first - old)[mask].abs().mean()), float((new - first)[mask].abs().mean())


def problems(rng: random.Random, count: int, *, held_out: bool) -> list[tuple[str, str]]:
    """Questions with their answers, from the training or the held-out problems."""
    drawn: list[tuple[str, str]] = []
    while len(drawn) < count:
        if is_held_out((candidate := problem(rng))[0]) == held_out:
            drawn.append(candidate)
    return drawn


def _number(label: str) -> int:
    return int(label.rpartition("@")[2])


def _prompts(drawn: Sequence[tuple[str, str]]) -> list[Trajectory]:
    return [{"messages": [{"role": "user", "content": question}]} for question, _ in drawn]


def _answer(sequence: SampledSequence) -> str:
    return str(sequence.new_input_feature["messages"][-1]["content"])


def reward(answer: str, truth: str) -> float:
    """1 for the right answer; up to 0.5 for correct digits, since most wrong answers have one wrong digit."""
    if answer == truth:
        return 1.0
    same = sum(a == b for a, b in zip(reversed(answer), reversed(truth), strict=False))
    return 0.5 * same / max(len(answer), len(truth), 1)


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
