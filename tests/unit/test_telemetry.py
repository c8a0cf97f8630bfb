"""What a router counts: metrics, an hour of history, events, and the log."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest

from tests.support.eventually import eventually
from tests.support.failing_service import PROMPTS, Service
from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.metrics import METRICS, Metric, MetricsSink
from twinkle_serve.errors import DeadlineError, EngineDeadError, RequestError
from twinkle_serve.routing.router import Router
from twinkle_serve.routing.telemetry import HISTORY_S, PERIOD_S, RouterState, Telemetry
from twinkle_serve.routing.tracks import Tracks


class Sink(MetricsSink):
    """Keeps everything that it gets."""

    def __init__(self) -> None:
        self.counters: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.gauges: dict[tuple[str, tuple[str, ...]], float] = {}
        self.observed: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        assert len(tags) == len(metric.tags)
        self.counters[metric.name, tags] += value  # type: ignore[assignment]

    def set(self, metric: Metric, value: float, tags: tuple[str, ...] = ()) -> None:
        assert len(tags) == len(metric.tags)
        self.gauges[metric.name, tags] = value

    def observe(self, metric: Metric, values: Sequence[float], tags: tuple[str, ...] = ()) -> None:
        assert len(tags) == len(metric.tags)
        self.observed[metric.name].extend(values)


@pytest.fixture
def sink(service: Service) -> Sink:
    """Takes the metrics of the service."""
    service.router._telemetry._sink = made = Sink()
    return made


def tick(router: Router) -> None:
    router._telemetry.tick(router._state())


def slow_down(service: Service) -> None:
    """Makes calls outlast a test."""
    for engine in service.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.5})


async def test_each_sample_and_token_is_counted_once(service: Service, sink: Sink) -> None:
    response = await service.router.sample(PROMPTS, {"max_tokens": 5, "ignore_eos": True}, num_samples=3)
    tick(service.router)
    samples = {tags[0]: n for (name, tags), n in sink.counters.items() if name == metrics.SAMPLES.name}
    tokens = sum(n for (name, _), n in sink.counters.items() if name == metrics.SAMPLED_TOKENS.name)
    assert sum(samples.values()) == 3 * len(PROMPTS) and set(samples) == set(service.engines)
    assert tokens == len(response.columns.tokens)
    assert sink.counters[metrics.PROMPTS.name, ("",)] == len(PROMPTS)
    assert sink.counters[metrics.PROMPT_TOKENS.name, ("",)] == sum(len(prompt["input_ids"]) for prompt in PROMPTS)
    assert sink.counters[metrics.CALLS.name, ("complete", "")] == 1
    assert len(sink.observed[metrics.QUEUED_SECONDS.name]) == len(PROMPTS)
    assert len(sink.observed[metrics.CALL_SECONDS.name]) == 1
    tick(service.router)
    assert sink.counters[metrics.CALLS.name, ("complete", "")] == 1, "nothing is counted twice"


async def test_a_text_stream_is_counted_as_any_sample(service: Service, sink: Sink) -> None:
    """Its tokens, also where a character or a stop string takes several, and its first text."""
    params = {"max_tokens": 40, "seed": 3, "ignore_eos": True}
    (sequence,) = (await service.router.sample(PROMPTS[:1], params)).sequences
    tick(service.router)
    before = sink.counters.copy()
    deltas = [delta async for delta in service.router.sample_stream(PROMPTS[0], params)]
    tick(service.router)
    assert deltas[-1][1] == "length"
    for metric, count in (
        (metrics.SAMPLES, 1),
        (metrics.SAMPLED_TOKENS, len(sequence.tokens)),
        (metrics.PROMPTS, 1),
        (metrics.PROMPT_TOKENS, len(PROMPTS[0]["input_ids"])),
    ):
        new = sink.counters - before
        assert sum(value for (name, _), value in new.items() if name == metric.name) == count, metric.name
    assert len(sink.observed[metrics.FIRST_TOKEN_SECONDS.name]) == 1


@pytest.mark.parametrize(
    ("options", "outcome"),
    [({"timeout_s": 0.1}, "deadline"), ({"adapter_name": "unknown"}, "invalid")],
)
async def test_calls_that_raise_are_counted_by_their_outcome(
    service: Service, sink: Sink, options: dict[str, str], outcome: str
) -> None:
    slow_down(service)
    with pytest.raises((DeadlineError, RequestError)):
        await service.router.sample(PROMPTS, {"max_tokens": 90, "ignore_eos": True}, **options)  # type: ignore[arg-type]
    tick(service.router)
    calls = {tags[0]: n for (name, tags), n in sink.counters.items() if name == metrics.CALLS.name and n}
    assert calls == {outcome: 1}
    assert service.router._telemetry.report()["points"][-1]["failed_calls"] == (outcome == "deadline")


async def test_counters_of_rare_things_are_there_at_zero(service: Service, sink: Sink) -> None:
    """Prometheus does not count the increase by which a series appears, and an alert must see the first loss."""
    tick(service.router)
    zero = {key for key, value in sink.counters.items() if value == 0}
    assert {(metric.name, tags) for metric in METRICS for tags in metric.initial} <= zero
    assert {(metrics.ENGINE_LOSSES.name, (engine,)) for engine in service.engines} <= zero
    assert {(metrics.SAMPLED_TOKENS.name, (engine, "")) for engine in service.engines} <= zero


async def test_lost_engine_is_an_event_with_its_reason(service: Service, sink: Sink) -> None:
    await service.router.sample(PROMPTS, {"max_tokens": 2})
    service.engines["a"].end(EngineDeadError("killed by the test"))

    async def is_back() -> bool:
        kinds = [event["kind"] for event in (await service.router.telemetry())["events"] if event["engine"] == "a"]
        return kinds == ["engine ready", "engine lost", "engine ready"]

    await eventually(is_back)
    tick(service.router)
    (lost,) = [event for event in (await service.router.telemetry())["events"] if event["kind"] == "engine lost"]
    assert "killed by the test" in lost["text"]
    assert "killed by the test" in (await service.router.status())["engines"]["a"]["last_failure"]
    assert sink.counters[metrics.ENGINE_LOSSES.name, ("a",)] == 1
    assert sink.gauges[metrics.ENGINE_STATE.name, ("a", "ready")] == 1
    assert sink.gauges[metrics.ENGINE_STATE.name, ("a", "dead")] == 0


async def test_running_calls_are_listed_and_can_be_cancelled(service: Service) -> None:
    slow_down(service)
    call = asyncio.ensure_future(
        service.router.sample(PROMPTS, {"max_tokens": 90, "ignore_eos": True}, num_samples=2, caller="someone")
    )

    async def runs() -> bool:
        return any(info["samples"] for info in await service.router.calls())

    await eventually(runs)
    (info,) = await service.router.calls()
    assert (info["caller"], info["track"], info["prompts"]) == ("someone", "main", len(PROMPTS))
    assert info["samples"] == 2 * len(PROMPTS) and info["samples_done"] == 0
    assert info["left_s"] is not None and 0 <= info["age_s"] < info["left_s"]
    assert await service.router.cancel(info["id"]) == len(PROMPTS)
    with pytest.raises(RequestError, match="cancelled"):
        await call
    assert await service.router.calls() == []


def test_history_is_bounded_and_read_from_a_time_on() -> None:
    now = 1000.0
    telemetry = Telemetry(clock=lambda: now)
    state = RouterState(
        running_calls=0, waiting=0, waiting_tokens=0.0, tracks=Tracks(["main"], {}, {}), engines={}, loads={}
    )
    for _ in range(int(2 * HISTORY_S / PERIOD_S)):
        now += PERIOD_S
        telemetry.tick(state)
    points = telemetry.report()["points"]
    assert len(points) == HISTORY_S / PERIOD_S
    assert points[-1]["time"] == now and points[-1]["tokens_per_s"] == 0 and points[-1]["call_s"] is None
    assert telemetry.report(since=now - 3 * PERIOD_S)["points"] == points[-3:]


async def test_log_has_a_line_while_something_runs_and_none_without(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await service.router.sample(PROMPTS, {"max_tokens": 5})
    for _ in range(6):
        tick(service.router)
    lines = [record.message for record in caplog.records if "tokens/s" in record.message]
    assert len(lines) == 1
    assert "0 samples running, 0 prompts waiting, 0 calls, 2 of 2 engines ready, weights initial" in lines[0]
    (record,) = [record for record in caplog.records if "tokens/s" in record.message]
    assert record.engines == record.engines_ready == 2 and record.weights == "initial"  # type: ignore[attr-defined]


def test_event_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Readiness, updates and the like; that an engine is lost is logged by the scheduler, as a warning."""
    caplog.set_level(logging.INFO)
    telemetry = Telemetry()
    telemetry.event("engine ready", "is ready", "engine-dp0")
    telemetry.event("weights", "step-1 is current")
    telemetry.engine_lost("engine-dp0", EngineDeadError("killed"), 3)
    assert [record.message for record in caplog.records] == ["engine-dp0: is ready", "step-1 is current"]
    assert [event["kind"] for event in telemetry.report()["events"]] == ["engine ready", "weights", "engine lost"]


def test_names_are_prometheus_names_and_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("twinkle_") and metric.description.endswith("."), metric
        assert (metric.kind == "histogram") == bool(metric.boundaries), metric
        assert not metric.name.endswith("_total"), "Prometheus's exporter adds it"
