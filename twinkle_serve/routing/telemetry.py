"""Counts a router's work, keeps an hour of history, and hands it to metrics and the log. Free of Ray."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.metrics import Metric, MetricsSink
from twinkle_serve.data_format.samples import STOP_REASONS, SampleColumns, StopReason
from twinkle_serve.data_format.status import EngineStatus
from twinkle_serve.data_format.telemetry import EngineLoad, Event, EventKind, HistoryPoint, TelemetryReport
from twinkle_serve.errors import (
    DeadlineError,
    EngineError,
    LeaseExpiredError,
    QueueFullError,
    RequestError,
    one_line,
)
from twinkle_serve.routing.tracks import Tracks

logger = logging.getLogger(__name__)

PERIOD_S = 5.0
"""Of points of the history, and of values of metrics."""
HISTORY_S = 3600.0
MAX_EVENTS = 1000
LOG_PERIODS = 2
"""One line of log for so many periods."""

STATES = ("starting", "catching up", "ready", "draining", "drained", "dead")
"""Of engines."""

OUTCOMES: tuple[tuple[type[BaseException], str], ...] = (
    (QueueFullError, "refused"),
    (LeaseExpiredError, "abandoned"),
    (DeadlineError, "deadline"),
    (RequestError, "invalid"),
    (EngineError, "failed"),
    (Exception, "failed"),
    (BaseException, "cancelled"),
)
"""Outcome of a call by its error; the first that matches counts."""
FAILURES = ("deadline", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterState:
    """The current state of a router."""

    running_calls: int
    waiting: int
    """Prompts, or parts of their samples, that wait for an engine."""
    waiting_tokens: float
    tracks: Tracks
    engines: Mapping[str, EngineStatus]
    loads: Mapping[str, EngineLoad]
    """Of the engines in use."""


@dataclass(slots=True)
class _Period:
    """Counts since the last point."""

    began: float
    tokens: Counter[str] = field(default_factory=Counter)
    """Sampled tokens by engine."""
    prompt_tokens: int = 0
    samples: int = 0
    calls: int = 0
    failed_calls: int = 0
    call_s: list[float] = field(default_factory=list)
    queued_s: list[float] = field(default_factory=list)
    staleness: list[float] = field(default_factory=list)


class Telemetry:
    """What a router has done.

    The methods that a call passes through only count; `tick` computes the rest, each PERIOD_S.
    """

    def __init__(self, sink: MetricsSink | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            sink: takes the metrics; None drops them.
            clock: returns the time, seconds since 1970.
        """
        self._sink, self._clock = sink, clock
        self._counts: Counter[tuple[Metric, tuple[str, ...]]] = Counter()
        """Increases of counters since the last tick."""
        self._observed: defaultdict[tuple[Metric, tuple[str, ...]], list[float]] = defaultdict(list)
        """Values of histograms since the last tick."""
        self._period = _Period(clock())
        self._points: deque[HistoryPoint] = deque(maxlen=int(HISTORY_S / PERIOD_S))
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._rates: dict[str, float] = {}
        """Tokens per second of each engine in the last period."""
        self._counted: set[str] = set()
        """Engines whose counters exist."""
        self._failures: dict[str, str] = {}
        """The last failure of each engine."""
        self._loads: dict[str, EngineLoad] = {}
        """Loads at the last tick."""
        self._unlogged: list[HistoryPoint] = []
        for metric in metrics.METRICS:
            for tags in metric.initial:
                self.count(metric, 0, *tags)

    # -- calls -----------------------------------------------------------------------------------

    def admitted(self, adapter: str, prompts: int, tokens: int) -> None:
        """Counts a call that was admitted."""
        self._counts[metrics.PROMPTS, (adapter,)] += prompts
        self._counts[metrics.PROMPT_TOKENS, (adapter,)] += tokens
        self._period.prompt_tokens += tokens

    def ended(self, adapter: str, seconds: float, error: BaseException | None) -> None:
        """Counts the end of a call.

        Args:
            error: raised by it; None for a complete one.
        """
        outcome = "complete" if error is None else next(name for kind, name in OUTCOMES if isinstance(error, kind))
        self._counts[metrics.CALLS, (outcome, adapter)] += 1
        self._period.calls += 1
        self._period.failed_calls += outcome in FAILURES
        if error is None:
            self._observed[metrics.CALL_SECONDS, (adapter,)].append(seconds)
            self._period.call_s.append(seconds)

    def sent(self, seconds: float) -> None:
        """Counts a prompt that went to an engine, so long after its admission."""
        self._observed[metrics.QUEUED_SECONDS, ()].append(seconds)
        self._period.queued_s.append(seconds)

    def first_token(self, seconds: float) -> None:
        """Counts the first token of a streamed call, so long after its admission."""
        self._observed[metrics.FIRST_TOKEN_SECONDS, ()].append(seconds)

    def arrived(self, engine: str, columns: SampleColumns, seconds: float | None) -> None:
        """Counts samples that an engine has returned.

        Args:
            seconds: since its engine was sent the first of them; None where unknown.
        """
        count, tokens = len(columns), len(columns.tokens)
        self._period.samples += count
        self._period.tokens[engine] += tokens
        if count == 1:
            adapter = columns.adapter[0]
            self._counts[metrics.SAMPLED_TOKENS, (engine, adapter)] += tokens
            self._counts[metrics.SAMPLES, (engine, adapter, STOP_REASONS[columns.stop_reason[0]])] += 1
        elif len(set(columns.adapter)) == 1:
            adapter = columns.adapter[0]
            self._counts[metrics.SAMPLED_TOKENS, (engine, adapter)] += tokens
            for reason, number in Counter(columns.stop_reason.tolist()).items():
                self._counts[metrics.SAMPLES, (engine, adapter, STOP_REASONS[reason])] += number
        else:
            rows = zip(columns.adapter, columns.stop_reason.tolist(), columns.lengths.tolist(), strict=True)
            for adapter, reason, length in rows:
                self._counts[metrics.SAMPLED_TOKENS, (engine, adapter)] += length
                self._counts[metrics.SAMPLES, (engine, adapter, STOP_REASONS[reason])] += 1
        if seconds is not None and (longest := tokens if count == 1 else int(columns.lengths.max())):
            self._observed[metrics.TOKEN_SECONDS, (engine,)].append(seconds / longest)

    def streamed(self, engine: str, adapter: str, tokens: int, stop_reason: StopReason | None) -> None:
        """Counts new tokens of a text stream, and its sample when that has ended."""
        self._period.tokens[engine] += tokens
        self._counts[metrics.SAMPLED_TOKENS, (engine, adapter)] += tokens
        if stop_reason is not None:
            self._period.samples += 1
            self._counts[metrics.SAMPLES, (engine, adapter, stop_reason)] += 1

    def stale(self, adapter: str, versions: int) -> None:
        """Counts how many newer versions there are at the end of a call."""
        self._observed[metrics.STALENESS, (adapter,)].append(versions)
        self._period.staleness.append(versions)

    # -- rarer things ----------------------------------------------------------------------------

    def count(self, metric: Metric, value: float = 1, *tags: str) -> None:
        """Increases a counter."""
        self._counts[metric, tags] += value  # type: ignore[assignment]

    def event(self, kind: EventKind, text: str, engine: str = "") -> None:
        """Records and logs something that happened once."""
        logger.info(f"{engine}: {text}" if engine else text)
        self._record(kind, text, engine)

    def _record(self, kind: EventKind, text: str, engine: str) -> None:
        self._events.append(Event(time=self._clock(), kind=kind, engine=engine, text=text))

    def engine_lost(self, engine: str, error: BaseException, prompts: int) -> None:
        """Records the loss of an engine, and that its prompts are sampled again."""
        reason = one_line(error)
        self._failures[engine] = reason
        self.count(metrics.ENGINE_LOSSES, 1, engine)
        self.count(metrics.RETRIED_PROMPTS, prompts)
        self._record("engine lost", f"{reason}; {prompts} prompts are sampled elsewhere", engine)  # its loss is logged

    # -- reading ---------------------------------------------------------------------------------

    def report(self, since: float = 0.0) -> TelemetryReport:
        """Returns points and events after a time, seconds since 1970."""
        return {
            "now": self._clock(),
            "period_s": PERIOD_S,
            "points": [point for point in self._points if point["time"] > since],
            "events": [event for event in self._events if event["time"] > since],
        }

    def rate(self, engine: str) -> float:
        """Returns an engine's tokens per second in the last period."""
        return self._rates.get(engine, 0.0)

    def last_failure(self, engine: str) -> str:
        """Returns why an engine was last lost; "" if it never was."""
        return self._failures.get(engine, "")

    # -- each period -----------------------------------------------------------------------------

    def tick(self, state: RouterState) -> None:
        """Ends a period: adds a point to the history, hands metrics to the sink, and logs."""
        now = self._clock()
        period, self._period = self._period, _Period(now)
        passed = max(now - period.began, 1e-3)
        self._rates = {engine: tokens / passed for engine, tokens in period.tokens.items()}
        point = HistoryPoint(
            time=now,
            tokens_per_s=period.tokens.total() / passed,
            prompt_tokens_per_s=period.prompt_tokens / passed,
            samples_per_s=period.samples / passed,
            calls=period.calls,
            failed_calls=period.failed_calls,
            running_calls=state.running_calls,
            sequences=sum(engine["sequences"] for engine in state.engines.values()),
            waiting=state.waiting,
            call_s=_percentiles(period.call_s),
            queued_s=_percentiles(period.queued_s),
            staleness=sum(period.staleness) / len(period.staleness) if period.staleness else None,
            engines_ready=sum(engine["state"] == "ready" for engine in state.engines.values()),
            weights=state.tracks.describe(),
        )
        self._points.append(point)
        for name in state.engines.keys() - self._counted:
            self.count(metrics.ENGINE_LOSSES, 0, name)
            self.count(metrics.SAMPLED_TOKENS, 0, name, "")
        self._counted.update(state.engines)
        self._count_loads(state.loads)
        if self._sink is not None:
            self._flush(self._sink, state)
        self._counts.clear()
        self._observed.clear()
        self._log(point, len(state.engines))

    def _count_loads(self, loads: Mapping[str, EngineLoad]) -> None:
        """Counts what engines have done since the last tick. One that was replaced begins at 0."""
        for name, load in loads.items():
            last = self._loads.get(name, EngineLoad())
            for metric, value, before in (
                (metrics.COMPUTED_TOKENS, load.computed_tokens, last.computed_tokens),
                (metrics.CACHED_TOKENS, load.cached_tokens, last.cached_tokens),
                (metrics.PREEMPTIONS, load.preemptions, last.preemptions),
            ):
                self.count(metric, value - before if value >= before else value, name)
        self._loads = dict(loads)

    def _flush(self, sink: MetricsSink, state: RouterState) -> None:
        for (metric, tags), value in self._counts.items():
            sink.add(metric, value, tags)
        for (metric, tags), values in self._observed.items():
            sink.observe(metric, values, tags)
        sink.set(metrics.RUNNING_CALLS, state.running_calls)
        sink.set(metrics.QUEUE_PROMPTS, state.waiting)
        sink.set(metrics.QUEUE_TOKENS, state.waiting_tokens)
        for track in state.tracks:
            sink.set(metrics.WEIGHTS_VERSION, track.weights.number, (track.name,))
        for name, engine in state.engines.items():
            for each in STATES:
                sink.set(metrics.ENGINE_STATE, float(engine["state"] == each), (name, each))
            sink.set(metrics.ENGINE_SEQUENCES, engine["sequences"], (name,))
            if (load := state.loads.get(name)) is not None:
                sink.set(metrics.ENGINE_BATCH_FILL, engine["batch_fill"], (name,))
                if load.kv_cache is not None:
                    sink.set(metrics.ENGINE_KV_CACHE, load.kv_cache, (name,))

    def _log(self, point: HistoryPoint, engines: int) -> None:
        """Logs a line for the last LOG_PERIODS points, if anything ran."""
        self._unlogged.append(point)
        if len(self._unlogged) < LOG_PERIODS:
            return
        points, self._unlogged = self._unlogged, []
        if not any(each["running_calls"] or each["tokens_per_s"] for each in points):
            return
        tokens_per_s = sum(each["tokens_per_s"] for each in points) / len(points)
        logger.info(
            f"{tokens_per_s:,.0f} tokens/s, "
            f"{point['sequences']} samples running, {point['waiting']} prompts waiting, "
            f"{point['running_calls']} calls, {point['engines_ready']} of {engines} engines ready, "
            f"weights {point['weights']}",
            extra={  # of logs in JSON
                "tokens_per_s": round(tokens_per_s),
                "sequences": point["sequences"],
                "waiting": point["waiting"],
                "running_calls": point["running_calls"],
                "engines_ready": point["engines_ready"],
                "engines": engines,
                "weights": point["weights"],
            },
        )


def _percentiles(values: Sequence[float]) -> list[float] | None:
    """Returns the 50th and 95th percentile; None without values."""
    ordered = sorted(values)
    return [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95)] if ordered else None
