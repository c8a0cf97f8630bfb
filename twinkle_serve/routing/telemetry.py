"""Counts a router's work, keeps an hour of history, and hands it to metrics and the log. Free of Ray."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

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


class _Period:
    """What calls have counted since the last tick, by adapter or engine alone: cheaper for a call than by `Metric`."""

    __slots__ = ("admitted", "arrived", "call_s", "queued_s", "staleness", "token_s")

    def __init__(self) -> None:
        self.admitted: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        """Prompts, and their tokens, by adapter."""
        self.call_s: defaultdict[str, list[float]] = defaultdict(list)
        """Durations of complete calls by name or label of their adapter."""
        self.queued_s: list[float] = []
        self.arrived: defaultdict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])
        """Samples, and their tokens, by engine, adapter and stop reason."""
        self.token_s: defaultdict[str, list[float]] = defaultdict(list)
        """Seconds per token by engine."""
        self.staleness: defaultdict[str, list[float]] = defaultdict(list)
        """Versions by adapter."""


class Telemetry:
    """What a router has done.

    The methods that a call passes through only count, in a few microseconds together; `tick` does the rest, each
    PERIOD_S. `scripts/bench router --only telemetry` measures what this costs.
    """

    def __init__(self, sink: MetricsSink | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            sink: takes the metrics; None drops them.
            clock: returns the time, seconds since 1970.
        """
        self._sink, self._clock = sink, clock
        self._period = _Period()
        self._counts: Counter[tuple[Metric, tuple[str, ...]]] = Counter()
        """Increases of counters since the last tick."""
        self._observed: defaultdict[tuple[Metric, tuple[str, ...]], list[float]] = defaultdict(list)
        """Values of histograms since the last tick."""
        self._began = clock()
        """Begin of the period."""
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
        counted = self._period.admitted[adapter]
        counted[0] += prompts
        counted[1] += tokens

    def completed(self, adapter: str, seconds: float) -> None:
        """Counts a call that was answered.

        Args:
            adapter: its name, or the label of a version of it.
        """
        self._period.call_s[adapter].append(seconds)

    def failed(self, adapter: object, error: BaseException) -> None:
        """Counts a call that raised.

        Args:
            adapter: as the caller named it; may be invalid.
        """
        name = adapter.partition("@")[0] if isinstance(adapter, str) else ""
        self.count(metrics.CALLS, 1, next(outcome for kind, outcome in OUTCOMES if isinstance(error, kind)), name)

    def sent(self, seconds: Iterable[float]) -> None:
        """Counts prompts that went to an engine, so long after their admission."""
        self._period.queued_s += seconds

    def first_token(self, seconds: float) -> None:
        """Counts the first token of a streamed call, so long after its admission."""
        self._observed[metrics.FIRST_TOKEN_SECONDS, ()].append(seconds)

    def arrived(self, engine: str, columns: SampleColumns, seconds: float | None) -> None:
        """Counts samples that an engine has returned.

        Args:
            seconds: since its engine was sent the first of them; None where unknown.
        """
        adapters, reasons, lengths = columns.adapter, columns.stop_reason.tolist(), columns.lengths.tolist()
        if adapters.count(adapters[0]) == len(adapters) and reasons.count(reasons[0]) == len(reasons):
            counted = self._period.arrived[engine, adapters[0], reasons[0]]
            counted[0] += len(lengths)
            counted[1] += len(columns.tokens)
        else:
            for adapter, reason, length in zip(adapters, reasons, lengths, strict=True):
                counted = self._period.arrived[engine, adapter, reason]
                counted[0] += 1
                counted[1] += length
        if seconds is not None and (longest := max(lengths)):
            self._period.token_s[engine].append(seconds / longest)

    def streamed(self, engine: str, adapter: str, tokens: int, stop_reason: StopReason | None) -> None:
        """Counts new tokens of a text stream, and its sample when that has ended."""
        self._counts[metrics.SAMPLED_TOKENS, (engine, adapter)] += tokens
        if stop_reason is not None:
            self._counts[metrics.SAMPLES, (engine, adapter, stop_reason)] += 1

    def stale(self, adapter: str, versions: int) -> None:
        """Counts how many newer versions there are at the end of a call."""
        self._period.staleness[adapter].append(versions)

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
        passed, self._began = max(now - self._began, 1e-3), now
        self._end_period()
        self._rates = {engine: tokens / passed for engine, tokens in self._counted_by(metrics.SAMPLED_TOKENS).items()}
        calls = self._counted_by(metrics.CALLS)
        staleness = self._observed_of(metrics.STALENESS)
        point = HistoryPoint(
            time=now,
            tokens_per_s=sum(self._rates.values()),
            prompt_tokens_per_s=self._counted_by(metrics.PROMPT_TOKENS).total() / passed,
            samples_per_s=self._counted_by(metrics.SAMPLES).total() / passed,
            calls=calls.total(),
            failed_calls=sum(calls[outcome] for outcome in FAILURES),
            running_calls=state.running_calls,
            sequences=sum(engine["sequences"] for engine in state.engines.values()),
            waiting=state.waiting,
            call_s=_percentiles(self._observed_of(metrics.CALL_SECONDS)),
            queued_s=_percentiles(self._observed_of(metrics.QUEUED_SECONDS)),
            staleness=sum(staleness) / len(staleness) if staleness else None,
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

    def _end_period(self) -> None:
        """Adds what calls have counted to the metrics."""
        period, self._period = self._period, _Period()
        for adapter, (prompts, tokens) in period.admitted.items():
            self.count(metrics.PROMPTS, prompts, adapter)
            self.count(metrics.PROMPT_TOKENS, tokens, adapter)
        for label, call_s in period.call_s.items():
            adapter = label.partition("@")[0]
            self.count(metrics.CALLS, len(call_s), "complete", adapter)
            self._observed[metrics.CALL_SECONDS, (adapter,)] += call_s
        for (engine, adapter, reason), (samples, tokens) in period.arrived.items():
            self.count(metrics.SAMPLES, samples, engine, adapter, STOP_REASONS[reason])
            self.count(metrics.SAMPLED_TOKENS, tokens, engine, adapter)
        if period.queued_s:
            self._observed[metrics.QUEUED_SECONDS, ()] = period.queued_s
        for engine, token_s in period.token_s.items():
            self._observed[metrics.TOKEN_SECONDS, (engine,)] = token_s
        for adapter, staleness in period.staleness.items():
            self._observed[metrics.STALENESS, (adapter,)] = staleness
        for values in self._observed.values():
            values.sort()  # once, for percentiles and buckets

    def _counted_by(self, metric: Metric) -> Counter[str]:
        """Returns the increases of a counter in this period by its first tag."""
        counted: Counter[str] = Counter()
        for (each, tags), number in self._counts.items():
            if each is metric:
                counted[tags[0]] += number
        return counted

    def _observed_of(self, metric: Metric) -> list[float]:
        """Returns the values of a histogram in this period."""
        return [value for (each, _), values in self._observed.items() if each is metric for value in values]

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
