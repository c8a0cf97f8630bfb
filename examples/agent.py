"""An agent with a tool, written with the package `openai` alone, and GRPO on the sessions in which it worked.

    scripts/serve                                          # in one terminal
    .venv/bin/python examples/agent.py --out /tmp/agent    # in another

The agent gets a problem and has a tool, `check`, which says whether an answer is right. Where it is wrong, the agent
reports that to the model, which tries again: `solve` below, which knows nothing of training. Each attempt is a session
of the gateway, so the trainer gets the very tokens that were sampled, with their logprobs, and not what a chat template
makes of the messages afterwards.

Each step has the agent attempt every problem of a batch several times, rewards its answers, takes optimizer steps on
the sessions, and publishes the weights to the service, which keeps them. Ends with the accuracy on held-out problems
at temperature 1, before and after.

The demo model writes numbers and has never seen a tool, so by default its whole reply is the argument of `check`, and
the question, asked again, the result. With --tool-calls the model calls `check` by the protocol: `tools` and
`tool_choice`, which structured output enforces, and messages of the role `tool`. To learn much from that, a
model has to know tools already.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
from policy import Policy, advantages, batch_of, turn_column
from sums import problems, reward

from twinkle_serve import InputFeature, connect, gateway_session
from twinkle_serve.gateway.client import DEFAULT_URL
from twinkle_serve.sampler import RunningSampler

REPLY_TOKENS = 8
CALL_TOKENS = 24
"""Of a reply with --tool-calls: the JSON of a call."""
WRONG = "wrong"
OFFERED: dict[str, Any] = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "check",
                "parameters": {
                    "type": "object",
                    "properties": {"answer": {"type": "integer"}},
                    "required": ["answer"],
                    "additionalProperties": False,
                },
            },
        }
    ],
    "tool_choice": {"type": "function", "function": {"name": "check"}},
}
"""Parameters of a turn with --tool-calls."""


async def solve(
    client: openai.AsyncOpenAI, question: str, check: Callable[[str], bool], *, model: str, tries: int, tool_calls: bool
) -> list[str]:
    """The agent. Returns its answers, one for each try; the last one counts."""
    messages: list[Any] = [{"role": "user", "content": question}]
    answers: list[str] = []
    while len(answers) < tries:
        reply = await client.chat.completions.create(
            model=model,
            messages=messages,
            max_completion_tokens=CALL_TOKENS if tool_calls else REPLY_TOKENS,
            temperature=1.0,
            **(OFFERED if tool_calls else {}),
        )
        message = reply.choices[0].message
        answers.append(answer_of(message))
        if check(answers[-1]):
            break
        messages += [message, result_of(message, question)]
    return answers


def answer_of(message: Any) -> str:
    """Returns the answer that a reply hands to the tool; "" if its call was cut short."""
    if not message.tool_calls:
        return str(message.content)
    try:
        return str(json.loads(message.tool_calls[0].function.arguments)["answer"])
    except ValueError:
        return ""


def result_of(message: Any, question: str) -> dict[str, str]:
    """Returns the message that tells the model that its answer is wrong."""
    if message.tool_calls:
        return {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": WRONG}
    return {"role": "user", "content": question}


@dataclass(frozen=True)
class Attempt:
    """One attempt of the agent at a problem."""

    session: str
    answers: list[str]
    truth: str

    @property
    def right(self) -> bool:
        return self.answers[-1] == self.truth

    @property
    def right_at_once(self) -> bool:
        return self.answers[0] == self.truth

    @property
    def rewards(self) -> list[float]:
        """Of each answer, in part for correct digits."""
        return [reward(answer, self.truth) for answer in self.answers]


@dataclass(frozen=True)
class Step:
    """Metrics of a step; one line of metrics.jsonl."""

    step: int
    reward: float
    """Mean reward of the last answers."""
    right: float
    """Share of attempts whose last answer is right."""
    right_at_once: float
    """Share of attempts whose first answer is right."""
    logprob_difference: float
    """Mean |Δlogprob| of the sampled tokens between trainer and sampler, before the optimizer step, nats."""
    policy_change: float
    """Mean |Δlogprob| of the same tokens between the first and the last inner step."""
    sessions_used: int
    """Number of attempts with an answer that is better or worse than others to the same problem, in the same try."""
    agent_s: float
    train_s: float
    publish_s: float


class Training:
    """The agent's attempts over HTTP, and the training on their sessions."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._sampler: RunningSampler = connect(arguments.service)
        self._policy = Policy(
            self._sampler,
            learning_rate=arguments.learning_rate,
            steps=arguments.steps,
            inner_steps=arguments.inner_steps,
            seed=arguments.seed,
        )
        self._policy.publish()

    async def attempts(self, drawn: Sequence[tuple[str, str]]) -> list[Attempt]:
        """Has agents attempt each problem in a session of its own."""
        arguments = self._arguments
        agents = asyncio.Semaphore(arguments.agents)
        async with openai.AsyncOpenAI(base_url=f"{arguments.url}/v1", api_key=arguments.key, timeout=600) as client:

            async def attempt(question: str, truth: str) -> Attempt:
                async with agents:
                    session = gateway_session(arguments.url, f"agent-{uuid.uuid4().hex}")
                    answers = await solve(
                        client.with_options(base_url=session.base_url),
                        question,
                        lambda answer: answer == truth,
                        model=arguments.service,
                        tries=arguments.tries,
                        tool_calls=arguments.tool_calls,
                    )
                return Attempt(session.id, answers, truth)

            return await asyncio.gather(*(attempt(*each) for each in drawn))

    async def features(self, attempts: Sequence[Attempt]) -> list[InputFeature]:
        """Returns the training input of each attempt, and ends its session."""
        ids = [attempt.session for attempt in attempts]
        features = await self._sampler.session_features_async(ids)
        await self._sampler.end_sessions_async(ids)
        return [path for (path,) in features]  # an attempt has no branches

    async def accuracy(self, drawn: Sequence[tuple[str, str]]) -> tuple[float, float]:
        """Returns the shares of right last and of right first answers, at temperature 1."""
        attempts = await self.attempts(drawn)
        await self._sampler.end_sessions_async([attempt.session for attempt in attempts])
        return _share(attempts, "right"), _share(attempts, "right_at_once")

    async def step(self, step: int, drawn: Sequence[tuple[str, str]], samples: int) -> Step:
        """Attempts, rewards, optimizes and publishes once."""
        started = time.perf_counter()
        attempts = await self.attempts([each for each in drawn for _ in range(samples)])
        inputs = await self.features(attempts)
        attempted = time.perf_counter()
        groups = [attempts[i : i + samples] for i in range(0, len(attempts), samples)]
        gains = [turns for group in groups for turns in turn_advantages(group)]
        used = [(path, turns) for path, turns in zip(inputs, gains, strict=True) if any(turns)]
        difference, change = 0.0, 0.0
        if used:
            batch = batch_of([path for path, _ in used])
            difference, change = self._policy.optimize(
                batch, turn_column(batch["labels"], [turns for _, turns in used])
            )
        trained = time.perf_counter()
        return Step(
            step=step,
            reward=sum(attempt.rewards[-1] for attempt in attempts) / len(attempts),
            right=_share(attempts, "right"),
            right_at_once=_share(attempts, "right_at_once"),
            logprob_difference=difference,
            policy_change=change,
            sessions_used=len(used),
            agent_s=attempted - started,
            train_s=trained - attempted,
            publish_s=self._policy.publish(),
        )


def turn_advantages(group: Sequence[Attempt]) -> list[list[float]]:
    """Returns the advantage of each answer of each attempt, among the answers of the same try to the same problem: a
    first answer is not to blame for the second, nor a second one for the first."""
    gains = [[0.0] * len(attempt.answers) for attempt in group]
    for turn in range(max(map(len, gains))):
        reached = [i for i, attempt in enumerate(group) if len(attempt.answers) > turn]
        found = advantages([group[i].rewards[turn] for i in reached])
        for i, gain in zip(reached, found or [0.0] * len(reached), strict=True):
            gains[i][turn] = gain
    return gains


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _share(attempts: Sequence[Attempt], name: str) -> float:
    return sum(getattr(attempt, name) for attempt in attempts) / len(attempts)


async def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains; writes metrics.jsonl and summary.json to `--out`. Returns the summary."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    rng = random.Random(arguments.seed)
    training = Training(arguments)
    held_out = problems(random.Random(1), arguments.held_out, held_out=True)
    before, before_at_once = await training.accuracy(held_out)
    print(f"held-out, temperature 1, before: {before:.1%} right, {before_at_once:.1%} at once", flush=True)
    steps: list[Step] = []
    with (arguments.out / "metrics.jsonl").open("w") as metrics:
        for number in range(1, arguments.steps + 1):
            drawn = problems(rng, arguments.prompts, held_out=False)
            step = await training.step(number, drawn, arguments.samples)
            steps.append(step)
            metrics.write(json.dumps(asdict(step)) + "\n")
            metrics.flush()
            if number % arguments.print_every == 0:
                recent = steps[-arguments.print_every :]
                means = {name: sum(getattr(each, name) for each in recent) / len(recent) for name in asdict(step)}
                print(
                    f"step {number:3d}  reward {means['reward']:.3f}  right {means['right']:.3f}  "
                    f"at once {means['right_at_once']:.3f}  |Δlogprob| {means['logprob_difference']:.1e}  "
                    f"agent {means['agent_s']:.1f} s  train {means['train_s']:.1f} s  "
                    f"publish {means['publish_s']:.2f} s",
                    flush=True,
                )
    after, after_at_once = await training.accuracy(held_out)
    summary = {
        "reward_first": _mean([step.reward for step in steps[:5]]),
        "reward_last": _mean([step.reward for step in steps[-5:]]),
        "right_before": before,
        "right_after": after,
        "right_at_once_before": before_at_once,
        "right_at_once_after": after_at_once,
        "held_out_problems": len(held_out),
        "steps": len(steps),
        "seconds": round(time.perf_counter() - started, 1),
        "largest_logprob_difference": max((step.logprob_difference for step in steps), default=0.0),
    }
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"held-out, temperature 1, after {len(steps)} steps, {summary['seconds']:.0f} s: {after:.1%} right, was "
        f"{before:.1%}; {after_at_once:.1%} at once, was {before_at_once:.1%}\n"
        f"reward of new problems: {summary['reward_last']:.3f} in the last 5 steps, was {summary['reward_first']:.3f}"
    )
    return summary


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=DEFAULT_URL, help="of the gateway, as scripts/serve prints it")
    parser.add_argument("--key", default="-", help="of the gateway, if it has any")
    parser.add_argument("--service", default="sampler", help="name of the application")
    parser.add_argument("--out", type=Path, required=True, help="directory for the metrics")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=64, help="problems per step")
    parser.add_argument("--samples", type=int, default=8, help="attempts per problem")
    parser.add_argument("--agents", type=int, default=128, help="how many attempt problems at the same time")
    parser.add_argument("--tries", type=int, default=2, help="calls of the tool per attempt")
    parser.add_argument(
        "--tool-calls", action="store_true", help="call the tool by the protocol, which the demo model does not know"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the first step; falls to a tenth")
    parser.add_argument("--inner-steps", type=int, default=2, help="optimizer steps per step")
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--print-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    asyncio.run(train(parse()))
