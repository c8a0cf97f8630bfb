"""Checks of agents' sessions: requests, and the trajectories that the service kept of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.chaos.calls import TIMEOUT_S, Call
from benchmarks.chaos.checks import LATE_S, Answered, Finding, check_samples
from benchmarks.chaos.publisher import History
from benchmarks.chaos.turns import (
    BROKEN,
    ERROR_EVENT,
    NO_END,
    PROXY_500,
    AgentSession,
    Message,
    TurnAttempt,
)
from twinkle_serve import SampleResponse
from twinkle_serve.data_format.samples import NO_SEED, STOP_REASONS, SampleColumns

STATUSES = ("429", "503", "504")
"""Statuses that a valid request may get while processes die."""
CODES = ("queue_full", "unavailable", "timeout")
"""The same in an event."""


@dataclass(slots=True)
class KeptTurn:
    """A turn of a trajectory."""

    id: str
    parent: int | None
    branch: str
    messages: tuple[Message, ...]
    """The whole conversation before the samples."""
    new: int
    """How many of them the turn adds."""
    prompt: list[int]
    """Token ids of the whole prompt."""
    nodes: list[Mapping[str, Any]] = field(default_factory=list)
    """One for each sample."""

    def tokens(self, sample: int) -> list[int]:
        node = self.nodes[sample]
        begin, end = node["sampled"]
        return list(node["token_ids"][begin:end])


def check_session(
    session: AgentSession, history: History, gateway_kills: Sequence[float]
) -> tuple[list[Finding], list[Answered]]:
    """Checks a session by itself. Returns the findings, and its turns as calls, which are still to be scored.

    Args:
        gateway_kills: when gateways were killed, seconds of time.monotonic.
    """
    findings = [Finding(kind, session.name, what) for kind, what in _requests(session, gateway_kills)]
    if session.problem:
        findings.append(Finding("failed", session.name, session.problem))
    if session.nodes is None:
        if any(attempt.acknowledged for attempt in session.attempts):
            findings.append(Finding("lost", session.name, "has acknowledged turns and no trajectory"))
        return findings, []
    try:
        kept = read_turns(session.nodes)
    except (LookupError, ValueError, TypeError) as error:
        return [*findings, Finding("wrong", session.name, f"malformed trajectory: {error!r}")], []
    matched, problems = _match(session, kept)
    findings += [Finding(kind, session.name, what) for kind, what in problems]
    calls = []
    for turn, attempts in matched:
        call = as_call(session.name, turn, attempts)
        findings += check_samples(call, history)
        calls.append(call)
    findings += [
        Finding(kind, session.name, f"turn {turn.id}: {what}") for turn, kind, what in _branches(kept, matched)
    ]
    return findings, calls


def _requests(session: AgentSession, gateway_kills: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Checks how the requests ended."""
    for attempt in session.attempts:
        took_s = attempt.ended_at - attempt.begun_at
        what = f"{attempt.error} after {took_s:.1f} s: {attempt.message[:200]}"
        if took_s > TIMEOUT_S + LATE_S or attempt.error == NO_END:
            yield "hang", what
        elif not attempt.acknowledged and not _may_fail(attempt, gateway_kills):
            yield "failed", what


def _may_fail(attempt: TurnAttempt, gateway_kills: Sequence[float]) -> bool:
    """Whether a request may end in this way while processes die."""
    kind, _, code = attempt.error.partition(": ")
    if kind == PROXY_500:  # the proxy has nothing else for a request whose gateway died
        return any(attempt.begun_at <= at <= attempt.ended_at for at in gateway_kills)
    if kind == BROKEN:
        return attempt.turn.stream
    return kind in STATUSES or (kind == ERROR_EVENT and code in CODES)


def read_turns(nodes: Sequence[Mapping[str, Any]]) -> list[KeptTurn]:
    """Reads a trajectory.

    Raises:
        LookupError, TypeError, ValueError: it is malformed.
    """
    whole: list[list[int]] = []
    conversations: list[tuple[Message, ...]] = []
    turns: dict[str, KeptTurn] = {}
    for number, node in enumerate(nodes):
        parent = node["parent"]
        begin, end = node["sampled"]
        _require(node["id"] == number, f"node {node['id']} is number {number}")
        _require(parent is None or 0 <= parent < number, f"node {number} follows {parent}")
        _require(0 <= begin < end == len(node["token_ids"]), f"node {number} has sampled tokens {node['sampled']}")
        *given, reply = map(_message, node["messages"])
        before = () if parent is None else conversations[parent]
        prompt = [*([] if parent is None else whole[parent]), *node["token_ids"][:begin]]
        made = KeptTurn(node["turn"], parent, node["branch"], (*before, *given), len(given), prompt)
        turn = turns.setdefault(node["turn"], made)
        _require(
            node["sample"] == len(turn.nodes) and (turn.messages, turn.prompt) == (made.messages, prompt),
            f"node {number} is sample {node['sample']} of another prompt than those before it",
        )
        turn.nodes.append(node)
        whole.append([*prompt, *node["token_ids"][begin:]])
        conversations.append((*turn.messages, _message(node["shown"]) if "shown" in node else reply))
    return list(turns.values())


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _message(message: Mapping[str, Any]) -> Message:
    return message["role"], message["content"] or ""


def _match(
    session: AgentSession, kept: Sequence[KeptTurn]
) -> tuple[list[tuple[KeptTurn, list[TurnAttempt]]], list[tuple[str, str]]]:
    """Finds the requests of each turn of a trajectory: the one that got it as its answer, or else those that may have
    sampled it before their answers were lost. Returns them and the violations: lost, doubled or wrong turns."""
    by_messages: dict[tuple[Message, ...], list[KeptTurn]] = defaultdict(list)
    for turn in kept:
        by_messages[turn.messages].append(turn)
    asked: dict[tuple[Message, ...], list[TurnAttempt]] = defaultdict(list)
    for attempt in session.attempts:
        asked[attempt.turn.messages].append(attempt)
    matched: list[tuple[KeptTurn, list[TurnAttempt]]] = []
    problems: list[tuple[str, str]] = []
    for messages, attempts in asked.items():
        left = by_messages.pop(messages, [])
        acknowledged = [attempt for attempt in attempts if attempt.acknowledged]
        for attempt in sorted(
            acknowledged, key=lambda attempt: attempt.turn.stream
        ):  # those that know their nodes first
            same = [turn for turn in left if _is_answer(turn, attempt)]
            found = min(same, key=lambda turn: turn.nodes[0]["id"] != attempt.choices[0].node, default=None)
            if found is None:
                tokens = [choice.tokens for choice in attempt.choices]
                instead = [[turn.tokens(i) for i in range(len(turn.nodes))] for turn in left]
                problems.append(("lost", f"acknowledged turn {messages[-1]}: {tokens}; the session has {instead}"))
                continue
            left.remove(found)
            matched.append((found, [attempt]))
            problems += [(kind, f"turn {found.id}: {what}") for kind, what in _answer(found, attempt)]
        failed = [attempt for attempt in attempts if not attempt.acknowledged]
        if len(left) > len(failed):
            what = f"{messages[-1]} was asked {len(attempts)} times, {len(failed)} of them without an answer"
            problems.append(("doubled", f"{what}, and {len(left)} turns are no answer: {[turn.id for turn in left]}"))
        else:
            matched += [(turn, failed) for turn in left]
    for messages, turns in by_messages.items():
        problems.append(("wrong", f"{len(turns)} turns of a conversation that was never sent: {messages}"))
    return matched, problems


def _is_answer(turn: KeptTurn, attempt: TurnAttempt) -> bool:
    """Whether a turn has the tokens of an answer, prompt and samples."""
    samples = [tuple(turn.tokens(i)) for i in range(len(turn.nodes))]
    return tuple(turn.prompt) == attempt.prompt and samples == [choice.tokens for choice in attempt.choices]


def _answer(turn: KeptTurn, attempt: TurnAttempt) -> Iterator[tuple[str, str]]:
    """Compares an answer with its turn, beyond the tokens."""
    for choice, node in zip(attempt.choices, turn.nodes, strict=True):
        _, text = _message(node.get("shown", node["messages"][-1]))
        if choice.text != text:
            yield "wrong", f"the client has the text {choice.text!r}, and the session {text!r}"
        if choice.finish != node["stop_reason"]:
            yield "wrong", f"ended by {choice.finish} for the client, and {node['stop_reason']} in the session"
        if choice.node not in (None, node["id"]):
            yield "mislabelled", f"the client was told node {choice.node} instead of {node['id']}"
        labels = (node["adapter"], tuple((label, start, end) for label, start, end in _spans(node)))
        told = (choice.adapter, choice.versions)
        if told != (None, None) and told != labels:
            yield "mislabelled", f"versions are {told} for the client, and {labels} in the session"


def _branches(
    kept: Sequence[KeptTurn], matched: Sequence[tuple[KeptTurn, list[TurnAttempt]]]
) -> Iterator[tuple[KeptTurn, str, str]]:
    """Checks where each turn follows the others, and the reasons why it does."""
    asked = {turn.id: attempts[0].turn for turn, attempts in matched}
    sampled: set[tuple[int | None, tuple[int, ...]]] = set()
    followed: set[int | None] = set()
    for turn in kept:
        prompt = (turn.parent, tuple(turn.prompt))
        of = asked.get(turn.id)
        if of is not None:
            if turn.new != len(of.messages) - of.known:
                what = f"{turn.new} new messages after node {turn.parent} ({turn.branch!r})"
                yield turn, "wrong", f"{what}; the session has {of.known} of the {len(of.messages)} already"
            if prompt in sampled:
                expected = "retry"
            elif any(role == "assistant" for role, _ in of.messages[of.known :]):
                expected = "edited"
            elif turn.parent in followed:
                expected = "root" if turn.parent is None else "fork"
            else:
                expected = ""
            if turn.branch != expected:
                yield turn, "mislabelled", f"branch is {turn.branch!r} instead of {expected!r}"
        sampled.add(prompt)
        followed |= {turn.parent, None}


def as_call(session: str, turn: KeptTurn, attempts: Sequence[TurnAttempt]) -> Answered:
    """Returns a turn as a call and its response, as trainers get them.

    Args:
        attempts: the request that got it as its answer, or those of which one has sampled it.
    """
    asked = attempts[0].turn
    samples = [turn.tokens(i) for i in range(len(turn.nodes))]
    logprobs = [node["logprobs"] for node in turn.nodes]
    columns = SampleColumns(
        group=np.zeros(len(samples), np.int64),
        sample=np.arange(len(samples), dtype=np.int32),
        lengths=np.array([len(tokens) for tokens in samples], np.int32),
        tokens=np.concatenate(samples).astype(np.int32),
        logprobs=None if None in logprobs else np.concatenate(logprobs).astype(np.float32)[:, None],
        logprob_tokens=None,
        stop_reason=np.array([STOP_REASONS.index(node["stop_reason"]) for node in turn.nodes], np.uint8),
        decoded=[""] * len(samples),
        seed=np.array([NO_SEED if node["seed"] is None else node["seed"] for node in turn.nodes]),
        engine=[node["engine"] for node in turn.nodes],
        adapter=[node["adapter"] for node in turn.nodes],
        weight_versions=[tuple((label, start) for label, start, _ in _spans(node)) for node in turn.nodes],
    )
    response = SampleResponse(
        columns=columns,
        prompts=[np.array(turn.prompt, np.int32)],
        inputs=[{}],
        logprobs_mode=turn.nodes[0]["logprobs_mode"],
        prompt_indices=(0,),
    )
    return Answered(
        name=f"{session} turn {turn.id}",
        call=Call(
            prompts=(tuple(turn.prompt),),
            num_samples=asked.n,
            max_tokens=asked.max_tokens,
            ignore_eos=asked.ignore_eos,
            seed=asked.seed,
            adapter=asked.model,
            iterated=False,
        ),
        begun_at=min(attempt.begun_at for attempt in attempts),
        ended_at=max(attempt.ended_at for attempt in attempts),
        responses=[response],
        error="",
        message="",
    )


def _spans(node: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Returns the versions of the sampled tokens, by index among these."""
    begin = node["sampled"][0]
    return [(span["weights"], span["start"] - begin, span["end"] - begin) for span in node["weight_versions"]]
