"""What a run is like, and all that is left of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from benchmarks.chaos.calls import TIMEOUT_S, Begun, recorded
from benchmarks.chaos.checks import Answered, Finding
from benchmarks.chaos.load import Life
from benchmarks.chaos.publisher import History
from benchmarks.chaos.reference import Reference
from benchmarks.chaos.watch import Watch

ENGINES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run is like."""

    engine: Literal["vllm", "fake"] = "vllm"
    minutes: float = 5.0
    """Of events; what begins in this time is waited for."""
    seed: int = 0
    period_s: float = 10.0
    """Between one event and the next, drawn between half and one and a half of it, from when all engines are ready."""
    calm_s: float = 30.0
    """Before the events, and again after them."""
    bound_s: float = 180.0
    """How long to wait for all engines after an event."""
    kinds: tuple[str, ...] = ()
    """Of events; none: all that there are."""
    overlapping: bool = False
    """Whether an event comes when it is due, though engines are missing."""
    trainers: int = 3
    callers: int = 4
    """Of each trainer."""
    publish_s: float = 4.0
    """Between versions of the model's own weights."""
    share: float = 1.0
    """Of the samples that are scored."""


@dataclass(slots=True, kw_only=True)
class Event:
    """Something that was done to the service."""

    kind: str
    target: str
    at: float
    recovered_s: float | None = None
    """Until all engines were ready and what was struck was replaced; None: not within the bound, or not waited for."""


PhaseName: TypeAlias = Literal["calm before", "events", "calm after"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run."""

    name: PhaseName
    begin: float
    end: float


@dataclass(slots=True)
class Run:
    """All that a run left."""

    options: Options
    history: History = field(default_factory=History)
    phases: list[Phase] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    watch: Watch | None = None
    findings: list[Finding] = field(default_factory=list)
    calls: list[Answered] = field(default_factory=list)
    """Those that ended, in their order of each trainer."""
    excused: int = 0
    """Calls past their deadline in an outage."""
    killed: int = 0
    """Calls that were killed with their trainer."""
    compared: int = 0
    """Samples of repeated calls that were compared with others."""
    reference: Reference | None = None
    """What scored the samples; None with the fake engine."""

    def rate(self, *names: PhaseName) -> float:
        """Tokens a second of calls that were answered, each call's tokens spread evenly over the time that it took."""
        phases = self._of(names)
        tokens = 0.0
        for call in self.calls:
            if not call.error:
                inside = sum(max(0.0, min(call.ended_at, p.end) - max(call.begun_at, p.begin)) for p in phases)
                tokens += call.tokens * inside / (call.ended_at - call.begun_at)
        return tokens / sum(p.end - p.begin for p in phases)

    def ready_share(self, *names: PhaseName) -> float:
        """Of the engines' seconds, those in which the service said that they are ready."""
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
    """What a trainer kept: its calls, those that failed, and those that never ended."""
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


def _is_excused(done: Run, answered: Answered) -> bool:
    """Past its deadline, and for half of that time or more there was no engine to sample it."""
    assert done.watch is not None
    outage_s = done.watch.outage_s(answered.begun_at, answered.ended_at)
    return answered.error == "DeadlineError" and outage_s > TIMEOUT_S / 2
