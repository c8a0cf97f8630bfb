"""The last hour of a service, and its running calls, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

EventKind = Literal["engine lost", "engine ready", "engine drained", "weights", "adapter", "poison"]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Load of an engine, by its own count."""

    running: int = 0
    """Sequences in its batch."""
    waiting: int = 0
    """Sequences that wait inside it."""
    kv_cache: float | None = None
    """Used part of the KV cache, 0 to 1; None without one of fixed size."""
    computed_tokens: int = 0
    """Prompt tokens that it has computed since its start."""
    cached_tokens: int = 0
    """Prompt tokens that it had in its prefix cache since its start."""
    preemptions: int = 0
    """Samples that it put off since its start, for lack of KV cache."""

    @property
    def prefix_hits(self) -> float:
        """Part of the prompt tokens that were in its prefix cache."""
        return self.cached_tokens / max(1, self.cached_tokens + self.computed_tokens)


class HistoryPoint(TypedDict):
    """A service over one period."""

    time: float
    """End of the period, seconds since 1970."""
    tokens_per_s: float
    prompt_tokens_per_s: float
    """Of prompts of admitted calls."""
    samples_per_s: float
    calls: int
    """Calls that ended."""
    failed_calls: int
    """Those of them that raised, without refused and cancelled ones."""
    running_calls: int
    sequences: int
    """Unfinished sequences on all engines."""
    waiting: int
    """Prompts, or parts of their samples, that wait for an engine."""
    call_s: list[float] | None
    """Duration of calls that ended: 50th and 95th percentile. None: none ended. Seconds."""
    queued_s: list[float] | None
    """The same of the time that prompts waited for an engine."""
    staleness: float | None
    """Mean number of versions published between the one that sampled a call and its end."""
    engines_ready: int
    weights: str
    """Label of the current weights."""


class Event(TypedDict):
    """Something that happened once."""

    time: float
    """Seconds since 1970."""
    kind: EventKind
    engine: str
    """"" where it concerns no engine by itself."""
    text: str


class TelemetryReport(TypedDict):
    """The history of a router, since it was started or for the last hour."""

    now: float
    """Seconds since 1970, by the router's clock."""
    period_s: float
    """Length of the period of a point."""
    points: list[HistoryPoint]
    events: list[Event]


class CallInfo(TypedDict):
    """A running call."""

    id: str
    """For `cancel`."""
    caller: str
    track: str
    """Whose engines sample it."""
    adapter: str
    """Label of its adapter version; "" for the model's own weights."""
    age_s: float
    left_s: float | None
    """Seconds to its deadline."""
    prompts: int
    samples: int
    """Number of samples that it asked for."""
    samples_done: int
    tokens_done: int
    """Tokens of these."""
