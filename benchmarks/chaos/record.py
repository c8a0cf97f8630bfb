"""Options and records of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from benchmarks.chaos.calls import TIMEOUT_S, Begun, recorded
from benchmarks.chaos.checks import Answered, Finding
from benchmarks.chaos.faults import GATEWAY_KILLED
from benchmarks.chaos.load import Life
from benchmarks.chaos.publisher import History
from benchmarks.chaos.reference import Reference
from benchmarks.chaos.trajectories import check_session
from benchmarks.chaos.turns import AgentSession
from benchmarks.chaos.watch import Watch

ENGINES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a run."""

    engine: Literal["vllm", "fake"] = "vllm"
    minutes: float = 5.0
    """Duration of the events; events that begin in it are waited for."""
    seed: int = 0
    period_s: float = 10.0
    """Mean pause before an event, counted from when all engines are ready; drawn between half and one and a half of
    it."""
    calm_s: float = 30.0
    """Duration of the calm phases before and after the events."""
    bound_s: float = 180.0
    """Longest wait for all engines after an event."""
    warm_up_s: float = 5.0
    """From the first calls to the first calm phase."""
    settled_s: float = 5.0
    """How long all engines must stay ready after an event: a dead one is not always noticed at once."""
    kinds: tuple[str, ...] = ()
    """Kinds of events; empty for all."""
    overlapping: bool = False
    """Whether events come on time even when engines are missing."""
    trainers: int = 3
    callers: int = 4
    """Concurrent calls of each trainer."""
    agents: int = 4
    """HTTP clients with sessions."""
    publish_s: float = 4.0
    """Period of new versions of the model's own weights."""
    share: float = 1.0
    """Share of the samples to score."""


SHORT = Options(
    engine="fake",
    minutes=0.2,
    period_s=1.5,
    calm_s=2.0,
    bound_s=90.0,
    warm_up_s=1.0,
    settled_s=3.0,
    kinds=(
        "engine replica killed",
        "router killed",
        "trainer killed",
        "store killed",
        "controller killed",
        GATEWAY_KILLED,
    ),
    overlapping=True,
    trainers=2,
    agents=3,
    publish_s=1.0,
    share=0.5,
)
"""A run of about half a minute: on the fake engine, with kills only, which do not wait for each other's recovery."""


@dataclass(slots=True, kw_only=True)
class Event:
    """A fault that the service went through."""

    kind: str
    target: str
    at: float
    recovered_s: float | None = None
    """Seconds until the target was replaced and all engines were ready; None if not within the bound, or not waited
    for."""


PhaseName: TypeAlias = Literal["calm before", "events", "calm after"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of the run."""

    name: PhaseName
    begin: float
    end: float


@dataclass(slots=True)
class Run:
    """All records of a run."""

    options: Options
    history: History = field(default_factory=History)
    phases: list[Phase] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    watch: Watch | None = None
    findings: list[Finding] = field(default_factory=list)
    calls: list[Answered] = field(default_factory=list)
    """Calls that ended, by trainer, in order."""
    excused: int = 0
    """Calls that missed their deadline because of an outage."""
    killed: int = 0
    """Calls that were killed with their trainer."""
    compared: int = 0
    """Samples of repeated calls that were compared with others."""
    sessions: list[AgentSession] = field(default_factory=list)
    """Sessions of the agents."""
    turns: list[Answered] = field(default_factory=list)
    """Turns of the trajectories that were fetched, as calls."""
    reference: Reference | None = None
    """Set once the samples are scored."""
    turns_scored: int = 0
    """Spans of the trajectories among those that agree."""

    def rate(self, *names: PhaseName) -> float:
        """Tokens per second of answered calls, each call's tokens spread evenly over its duration."""
        phases = self._of(names)
        tokens = 0.0
        for call in self.calls:
            if not call.error:
                inside = sum(max(0.0, min(call.ended_at, p.end) - max(call.begun_at, p.begin)) for p in phases)
                tokens += call.tokens * inside / (call.ended_at - call.begun_at)
        return tokens / sum(p.end - p.begin for p in phases)

    def ready_share(self, *names: PhaseName) -> float:
        """Share of the engines' time in which the service reported them ready."""
        assert self.watch is not None
        phases = self._of(names)
        ready = sum(self.watch.engine_seconds(p.begin, p.end) for p in phases)
        return ready / (ENGINES * sum(p.end - p.begin for p in phases))

    def _of(self, names: Sequence[PhaseName]) -> list[Phase]:
        return [phase for phase in self.phases if phase.name in names]

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        begin = time.monotonic()
        print(f"{name} ...", flush=True)
        yield
        self.phases.append(Phase(name, begin, time.monotonic()))


def read(done: Run, life: Life) -> None:
    """Reads a trainer's records: its calls, including those that failed or never ended."""
    begun: dict[int, Begun] = {}
    for record in recorded(life.path):
        if isinstance(record, Begun):
            begun[record.number] = record
            continue
        first = begun.pop(record.number)
        answered = Answered(
            name=f"{life.path.stem} call {record.number}",
            call=first.call,
            begun_at=first.at,
            ended_at=record.at,
            responses=record.responses,
            error=record.error,
            message=record.message,
        )
        done.calls.append(answered)
        if _is_excused(done, answered):
            done.excused += 1
        elif record.error:
            begun_s = first.at - (done.events[0].at if done.events else first.at)
            when = f"begun {begun_s:.1f} s after the first event, over after {record.at - first.at:.1f} s"
            done.findings.append(answered.finding("failed", f"{record.error}: {record.message} ({when})"))
    if life.killed:
        done.killed += len(begun)
    else:
        done.findings += [Finding("hang", f"{life.path.stem} call {n}", f"{b.call}") for n, b in begun.items()]


def read_sessions(done: Run) -> None:
    """Checks the agents' sessions, and keeps their turns for scoring."""
    assert done.watch is not None
    kills = [event.at for event in done.events if event.kind == GATEWAY_KILLED]
    for session in done.sessions:
        findings, calls = check_session(session, done.history, kills)
        done.findings += findings
        done.turns += calls
        if session.given_up:
            attempts = session.turns[-1]
            took_s = attempts[-1].ended_at - attempts[0].begun_at
            if done.watch.outage_s(attempts[0].begun_at, attempts[-1].ended_at) <= took_s / 2:
                what = f"a turn was not answered in {len(attempts)} requests and {took_s:.0f} s"
                done.findings.append(Finding("failed", session.name, what))


def _is_excused(done: Run, answered: Answered) -> bool:
    """Whether it missed its deadline, and no engine was ready for at least half of that time."""
    assert done.watch is not None
    outage_s = done.watch.outage_s(answered.begun_at, answered.ended_at)
    return answered.error == "DeadlineError" and outage_s > TIMEOUT_S / 2
