"""Turns that agents take over HTTP, and their records."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from benchmarks.chaos.calls import ADAPTERS

TURNS = (3, 8)
"""Turns of a session."""
TOKENS = (4, 24)
CONTEXT = 512
"""Context of the engines: the longest session fits."""

TurnKind: TypeAlias = Literal["next", "retry", "fork", "edited"]
"""Why an agent takes a turn. next: the conversation goes on. retry: the last turn is sampled again. fork: another
question follows an earlier answer. edited: as next, after a change to the last answer."""
KINDS: tuple[TurnKind, ...] = ("next", "retry", "fork", "edited")
WEIGHTS = (70, 10, 10, 10)

Message: TypeAlias = tuple[str, str]
"""Role and text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of a session."""

    kind: TurnKind
    messages: tuple[Message, ...]
    """The whole conversation."""
    known: int
    """How many messages the session has: those up to the last one that is as it was sampled."""
    model: str
    """Name of the adapter; "" for the base model."""
    n: int
    max_tokens: int
    ignore_eos: bool
    seed: int | None
    stream: bool

    def body(self) -> dict[str, Any]:
        """Returns the body of its request for `/v1/chat/completions`."""
        body: dict[str, Any] = {
            "messages": [{"role": role, "content": text} for role, text in self.messages],
            "n": self.n,
            "max_completion_tokens": self.max_tokens,
            "ignore_eos": self.ignore_eos,
            "stream": self.stream,
            "return_token_ids": True,
        }
        if self.model:
            body["model"] = self.model
        if self.seed is not None:
            body["seed"] = self.seed
        return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One reply of an answer."""

    text: str
    tokens: tuple[int, ...]
    finish: str
    node: int | None = None
    """Its node in the session; streams do not say it."""
    adapter: str | None = None
    """Label of the adapter's version, "" for the base model; None if the answer does not say it."""
    versions: tuple[tuple[str, int, int], ...] | None = None
    """Label, first token and end of each span; None if the answer does not say them."""


CUT = "ended as if it were complete"
"""Outcome of an answer that lacks its end, and did not fail."""
NO_END = "did not end"
BROKEN = "connection broken"
REFUSED = "connection refused"
ERROR_EVENT = "error event"
PROXY_500 = "500 of Serve's proxy"
"""The proxy's own answer for a gateway that ended with the request; its body is no JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnAttempt:
    """One request for a turn."""

    turn: Turn
    begun_at: float
    """Seconds of time.monotonic."""
    ended_at: float
    error: str = ""
    """Kind of failure: one of the above, the last two with their message, or an HTTP status; "" for a success."""
    message: str = ""
    prompt: tuple[int, ...] = ()
    choices: tuple[Choice, ...] = ()

    @property
    def acknowledged(self) -> bool:
        """Whether the client got the complete answer."""
        return not self.error


@dataclass(slots=True)
class AgentSession:
    """A session of an agent: its requests in order, and what the service kept."""

    id: str
    name: str
    """For example "agent-0 session 3"."""
    attempts: list[TurnAttempt] = field(default_factory=list)
    given_up: bool = False
    """Whether its last turn was not answered before the agent's deadline."""
    nodes: list[dict[str, Any]] | None = None
    """Of the trajectory; None if it was not fetched."""
    problem: str = ""
    """Why it was not fetched, or not ended."""

    @property
    def turns(self) -> list[list[TurnAttempt]]:
        """Requests of each turn. A turn is repeated until one of them is acknowledged."""
        turns: list[list[TurnAttempt]] = []
        for attempt in self.attempts:
            if turns and not turns[-1][-1].acknowledged:
                turns[-1].append(attempt)
            else:
                turns.append([attempt])
        return turns


class Conversations:
    """Draws the turns of one session, given the answers so far."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._written: set[str] = set()
        """Texts of the agent's own."""
        self._taken: list[tuple[Turn, str]] = []
        """Turns with the answers that the agent goes on with."""
        self.length = rng.randint(*TURNS)

    def next_turn(self) -> Turn:
        """Draws the next turn."""
        kind: TurnKind = self._rng.choices(KINDS, WEIGHTS)[0] if self._taken else "next"
        if kind == "retry":
            return replace(self._taken[-1][0], kind=kind)
        before: tuple[Message, ...] = ()
        known = 0
        if self._taken:
            turn, answer = self._rng.choice(self._taken) if kind == "fork" else self._taken[-1]
            before, known = (*turn.messages, ("assistant", answer)), len(turn.messages) + 1
        if kind == "edited":
            before, known = (*before[:-1], ("assistant", f"It is {self._sum()}")), turn.known
        return Turn(
            kind=kind,
            messages=(*before, ("user", self._sum())),
            known=known,
            model=self._rng.choice((*ADAPTERS, "")),
            n=2 if self._rng.random() < 0.25 else 1,
            max_tokens=self._rng.randint(*TOKENS),
            ignore_eos=self._rng.random() < 0.5,
            seed=self._rng.randrange(2**62) if self._rng.random() < 0.3 else None,
            stream=self._rng.random() < 0.5,
        )

    def answered(self, turn: Turn, choices: Sequence[Choice]) -> None:
        """Goes on with one of a turn's replies."""
        self._taken.append((turn, self._rng.choice(choices).text))

    def _sum(self) -> str:
        """Draws a text that the session does not have yet: conversations then differ unless they are repeated."""
        while True:
            text = f"{self._rng.randrange(10, 1000)}{self._rng.choice('+-')}{self._rng.randrange(10, 1000)}="
            if text not in self._written:
                self._written.add(text)
                return text


def read_answer(body: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[Choice, ...]]:
    """Reads the prompt's tokens and the replies of an answer that is not streamed.

    Raises:
        LookupError, TypeError: it is not complete.
    """
    choices = tuple(
        Choice(
            text=choice["message"]["content"],
            tokens=tuple(choice["token_ids"]),
            finish=choice["finish_reason"],
            node=choice["node"],
            adapter=choice["adapter"] or "",
            versions=tuple((span["version"], span["start"], span["end"]) for span in choice["weight_versions"]),
        )
        for choice in sorted(body["choices"], key=lambda choice: int(choice["index"]))
    )
    return tuple(body["prompt_token_ids"]), choices


class StreamedAnswer:
    """The events of a streamed answer, joined."""

    def __init__(self, n: int) -> None:
        self.prompt: tuple[int, ...] = ()
        self.done = False
        """Whether the stream said that it is complete."""
        self.error: Mapping[str, Any] | None = None
        """The error that it ended with."""
        self._texts = [""] * n
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._finish = [""] * n

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Adds the JSON of an event."""
        if "error" in chunk:
            self.error = chunk["error"]
            return
        self.prompt = tuple(chunk.get("prompt_token_ids", self.prompt))
        for choice in chunk["choices"]:
            index = choice["index"]
            self._texts[index] += choice["delta"].get("content") or ""
            self._tokens[index] += choice.get("token_ids") or []
            self._finish[index] = choice["finish_reason"] or self._finish[index]

    @property
    def complete(self) -> bool:
        """Whether it has its end, and every reply has one."""
        return self.done and self.error is None and all(self._finish)

    @property
    def choices(self) -> tuple[Choice, ...]:
        parts = zip(self._texts, self._tokens, self._finish, strict=True)
        return tuple(Choice(text=text, tokens=tuple(tokens), finish=finish) for text, tokens, finish in parts)
