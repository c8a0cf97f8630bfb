"""Agents: HTTP clients outside of Ray, each with one session after another."""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx

from benchmarks.chaos.calls import TIMEOUT_S
from benchmarks.chaos.checks import LATE_S
from benchmarks.chaos.turns import (
    BROKEN,
    CUT,
    ERROR_EVENT,
    NO_END,
    PROXY_500,
    REFUSED,
    AgentSession,
    Conversations,
    StreamedAnswer,
    Turn,
    TurnAttempt,
    read_answer,
)
from twinkle_serve import gateway_session
from twinkle_serve.errors import ServiceError, SessionGoneError, TwinkleServeError
from twinkle_serve.sampler import RunningSampler

PAUSE_S = 0.5
"""Before a turn is sent again."""
GIVE_UP_S = TIMEOUT_S + 60.0
"""How long an agent repeats a turn."""
LIMIT_S = TIMEOUT_S + LATE_S
"""After this time a request hangs, and its client goes away."""
FETCH_S = 120.0
"""How long a trajectory is asked for: a gateway may be starting."""


class Agent(threading.Thread):
    """One agent. It speaks to the gateway by requests of its own, as any program may."""

    def __init__(self, number: int, url: str, seed: int, end: threading.Event) -> None:
        super().__init__(name=f"agent-{number}", daemon=True)
        self._url, self._end = url, end
        self._rng = random.Random(f"{seed}/agent/{number}")
        self.sessions: list[AgentSession] = []
        self.died_of: Exception | None = None

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # an answer that is no HTTP, or no JSON
            self.died_of = error

    def _run(self) -> None:
        while not self._end.is_set():
            session = AgentSession(uuid.uuid4().hex, f"{self.name} session {len(self.sessions)}")
            self.sessions.append(session)
            self._talk(session)

    def _talk(self, session: AgentSession) -> None:
        conversations = Conversations(self._rng)
        # A client of its own for each session, as most agents have: connections are reused within it.
        with httpx.Client(timeout=LIMIT_S, headers={"x-timeout-s": f"{TIMEOUT_S:g}"}) as client:
            url = f"{gateway_session(self._url, session.id).base_url}/chat/completions"
            while len(session.turns) < conversations.length and not self._end.is_set():
                turn = conversations.next_turn()
                attempt = self._take(session, lambda turn=turn: request(client, url, turn))  # type: ignore[misc]
                if attempt is None:
                    return
                conversations.answered(turn, attempt.choices)

    def _take(self, session: AgentSession, make: Callable[[], TurnAttempt]) -> TurnAttempt | None:
        """Sends a turn until it is acknowledged. Returns None if that took too long."""
        give_up_at = time.monotonic() + GIVE_UP_S
        while True:
            session.attempts.append(attempt := make())
            if attempt.acknowledged:
                return attempt
            if time.monotonic() > give_up_at:
                session.given_up = True
                return None
            time.sleep(PAUSE_S)


def request(client: httpx.Client, url: str, turn: Turn) -> TurnAttempt:
    """Sends a turn once."""
    begun_at = time.monotonic()
    attempt = TurnAttempt(turn=turn, begun_at=begun_at, ended_at=begun_at)
    try:
        with client.stream("POST", url, json=turn.body()) as answer:
            if answer.status_code != 200:
                attempt = _failed(attempt, answer)
            elif turn.stream:
                attempt = _streamed(attempt, answer)
            else:
                attempt = _whole(attempt, answer)
    except httpx.TimeoutException as error:
        attempt = replace(attempt, error=NO_END, message=repr(error))
    except httpx.ConnectError as error:
        attempt = replace(attempt, error=REFUSED, message=repr(error))
    except httpx.TransportError as error:
        attempt = replace(attempt, error=BROKEN, message=repr(error))
    return replace(attempt, ended_at=time.monotonic())


def _failed(attempt: TurnAttempt, answer: httpx.Response) -> TurnAttempt:
    text = answer.read().decode(errors="replace")
    try:
        json.loads(text)
    except ValueError:
        if answer.status_code == 500:
            return replace(attempt, error=PROXY_500, message=text)
    return replace(attempt, error=str(answer.status_code), message=text)


def _whole(attempt: TurnAttempt, answer: httpx.Response) -> TurnAttempt:
    data = answer.read()
    try:
        prompt, choices = read_answer(json.loads(data))
    except (ValueError, LookupError, TypeError) as error:
        return replace(attempt, error=CUT, message=f"{error!r}: {data[-200:]!r}")
    return replace(attempt, prompt=prompt, choices=choices)


def _streamed(attempt: TurnAttempt, answer: httpx.Response) -> TurnAttempt:
    joined, last = StreamedAnswer(attempt.turn.n), b""
    for data in events(answer.iter_bytes()):
        last = data
        if time.monotonic() > attempt.begun_at + LIMIT_S:
            return replace(attempt, error=NO_END)
        if data == b"[DONE]":
            joined.done = True
        else:
            joined.add(json.loads(data))
    if joined.error is not None:
        what = joined.error.get("code") or joined.error.get("type")
        return replace(attempt, error=f"{ERROR_EVENT}: {what}", message=str(joined.error.get("message")))
    if not joined.complete:
        return replace(attempt, error=CUT, message=f"the last event is {last[-200:]!r}")
    return replace(attempt, prompt=joined.prompt, choices=joined.choices)


def events(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the data of server-sent events; comments are left out. An event without its end does not count."""
    buffer = b""
    for part in parts:
        buffer += part
        *whole, buffer = buffer.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):
                yield event.removeprefix(b"data: ")


class Agents:
    """A constant number of agents."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        self._url = url
        self._end = threading.Event()
        self._agents = [Agent(number, url, seed, self._end) for number in range(count)]

    def start(self) -> None:
        for agent in self._agents:
            agent.start()

    def end(self) -> None:
        """Ends the agents after their current turns, without waiting."""
        self._end.set()

    def stop(self, timeout_s: float) -> list[str]:
        """Ends the agents after their current turns. Returns a description of each that does not end, or has died."""
        self.end()
        deadline = time.monotonic() + timeout_s
        for agent in self._agents:
            agent.join(max(0.0, deadline - time.monotonic()))
        died = [f"{agent.name} died of {agent.died_of!r}" for agent in self._agents if agent.died_of is not None]
        return [*died, *(f"{agent.name} has a turn that does not end" for agent in self._agents if agent.is_alive())]

    def collect(self, sampler: RunningSampler | None) -> list[AgentSession]:
        """Fetches the trajectories over HTTP, the first one also by handle, and ends the sessions. Returns them.

        Args:
            sampler: None for a sampler that is no service, and has no sessions by handle.
        """
        sessions = [session for agent in self._agents for session in agent.sessions if session.attempts]
        for i, session in enumerate(sessions):
            try:
                self._collect(session, sampler if i == 0 else None)
            except TwinkleServeError as error:
                session.problem = f"{type(error).__name__}: {error}"
        return sessions

    def _collect(self, session: AgentSession, sampler: RunningSampler | None) -> None:
        remote = gateway_session(self._url, session.id)
        session.nodes = patiently(remote.trajectory)["nodes"]
        if sampler is not None and sampler.session(session.id).trajectory()["nodes"] != session.nodes:
            session.problem = "the trajectory by handle is another one"
        patiently(remote.end)
        try:
            patiently(remote.trajectory)
        except SessionGoneError:
            return
        session.problem = "it has a trajectory after its end"


def patiently(call: Callable[[], Any]) -> Any:
    """Repeats a call of the gateway while that does not answer. Raises ServiceError after FETCH_S."""
    give_up_at = time.monotonic() + FETCH_S
    while True:
        try:
            return call()
        except ServiceError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(PAUSE_S)
