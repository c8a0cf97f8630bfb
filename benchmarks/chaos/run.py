"""One run: a cluster of its own, load, events, and what is found when all is over."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from benchmarks.chaos.calls import TIMEOUT_S, Begun, recorded
from benchmarks.chaos.checks import LATE_S, Answered, Finding, check, check_references
from benchmarks.chaos.faults import Faults, NoVictim
from benchmarks.chaos.load import Life, Trainers
from benchmarks.chaos.publisher import UPDATE_TIMEOUT_S, History, Publisher
from benchmarks.chaos.reference import Reference
from benchmarks.chaos.watch import Watch
from tests.integration.conftest import deploy, ray_cluster

APPLICATION = "chaos"
ENGINES = 2
ENGINE_ARGS: dict[str, dict[str, Any]] = {
    "vllm": {
        "dtype": "float32",
        "max_model_len": 256,
        "kv_cache_memory_bytes": 2**28,
        "enable_lora": True,
        "max_loras": 4,
        "max_lora_rank": 8,
    },
    "fake": {"max_model_len": 256, "token_latency_s": 0.02},
}
OBJECT_STORE_BYTES = 2**27
SETTLED_S = 5.0
"""How long all engines must have been ready: a dead one is not always missed at once."""
POLL_S = 0.1
WARM_UP_S = 5.0
IDLE_S = 30.0
"""Within which the service must have let go of everything after the last call."""


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


def run(options: Options) -> Run:
    """Deploys a service, has all of it happen, and checks every response."""
    done = Run(options)
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        # Two cores more than the engines': router, store and trainers ask for next to nothing.
        with ray_cluster(num_cpus=ENGINES + 2, object_store_memory=OBJECT_STORE_BYTES):
            lives = _disturb(done, Path(directory))
        for life in lives:
            _read(done, life)
    for answered in done.calls:
        done.findings += check(answered, done.history)
    differences, done.compared = check_references(done.calls)
    done.findings += differences
    if options.engine == "vllm":
        print(f"scoring the samples of {len(done.calls)} calls ...", flush=True)
        done.reference = Reference(done.history)
        done.findings += done.reference.check(done.calls, options.share, random.Random(options.seed))
    return done


def _disturb(done: Run, directory: Path) -> list[Life]:
    """Everything that needs the service."""
    options = done.options
    sampler = deploy(
        APPLICATION,
        engine=options.engine,
        device_mesh={"dp_size": ENGINES},
        engine_args=ENGINE_ARGS[options.engine],
    )
    trainers = Trainers(APPLICATION, directory, options.seed, options.callers)
    rng = random.Random(options.seed)
    faults = Faults(APPLICATION, ENGINES, trainers, rng, cores=options.engine == "vllm")
    publisher = Publisher(sampler, done.history, options.publish_s)
    done.watch = watch = Watch(sampler, ENGINES)
    watch.start()
    publisher.start()
    for life in [trainers.add() for _ in range(options.trainers)]:
        assert trainers.connected(life, timeout_s=60), f"{life.path.stem} did not connect"
    time.sleep(WARM_UP_S)
    with done.phase("calm before"):
        time.sleep(options.calm_s)
    try:
        with done.phase("events"):
            _events(done, faults, watch, rng)
    finally:
        faults.end()
    with done.phase("calm after"):
        time.sleep(options.calm_s)
    done.findings += [Finding("hang", "trainers", wrong) for wrong in trainers.stop(TIMEOUT_S + LATE_S)]
    if not publisher.stop(UPDATE_TIMEOUT_S + LATE_S):
        done.findings.append(Finding("hang", "publisher", "an update or an adapter does not end"))
    if left := _left_behind(watch):
        done.findings.append(Finding("left behind", "service", f"{IDLE_S:g} s after the last call: {left}"))
    watch.stop()
    return trainers.lives


def _events(done: Run, faults: Faults, watch: Watch, rng: random.Random) -> None:
    """One event after the other. Each kind comes once before one comes again."""
    options = done.options
    end = time.monotonic() + options.minutes * 60
    kinds: list[str] = []
    while True:
        time.sleep(min(rng.uniform(0.5, 1.5) * options.period_s, max(0.0, end - time.monotonic())))
        if time.monotonic() >= end:
            break
        if not kinds:
            kinds = rng.sample(chosen := list(options.kinds or faults.kinds), len(chosen))
        kind = kinds.pop()
        at = time.monotonic()
        try:
            strike = faults.strike(kind, watch.ready)
        except NoVictim as error:
            print(f"  {kind}: left out, {error}", flush=True)
            continue
        event = Event(kind=kind, target=strike.target, at=at)
        done.events.append(event)
        if not options.overlapping:
            _await_recovery(done, event, strike.over, watch)
        _tell(done, event)
    if options.overlapping:
        last = Event(kind="all engines ready", target="service", at=time.monotonic())
        _await_recovery(done, last, lambda: True, watch)
        print(f"  all engines ready after {last.recovered_s} s", flush=True)


def _await_recovery(done: Run, event: Event, over: Callable[[], bool], watch: Watch) -> None:
    """Until all engines are ready, and stay so, after what was struck is replaced; or the bound."""
    over_at: float | None = None
    while (now := time.monotonic()) < event.at + done.options.bound_s:
        try:
            if over_at is None and over():
                over_at = now
        except Exception as error:  # a trainer that cannot connect
            done.findings.append(Finding("failed", event.target, f"{type(error).__name__}: {error}"))
            over_at = now
        since = watch.all_ready_since()
        if over_at is not None and since is not None:
            recovered_at = max(since, over_at)
            if now - recovered_at > SETTLED_S:
                event.recovered_s = recovered_at - event.at
                return
        time.sleep(POLL_S)


def _tell(done: Run, event: Event) -> None:
    after = f"{event.at - done.phases[0].end:6.1f} s"
    if event.recovered_s is not None:
        became = f"all engines ready after {event.recovered_s:.1f} s"
    else:
        became = "" if done.options.overlapping else f"NOT all engines ready within {done.options.bound_s:g} s"
    print(f"  {after}  {event.kind}: {event.target}  {became}", flush=True)


def _left_behind(watch: Watch) -> str:
    """What the service still holds, though nobody calls; "" if it is nothing."""
    end = time.monotonic() + IDLE_S
    while True:
        status = watch.status()
        if status is None:
            left = "no status"
        else:
            held = {name: engine["sequences"] for name, engine in status["engines"].items() if engine["sequences"]}
            counts = {"requests": status["requests"], "groups_waiting": status["groups_waiting"], "sequences": held}
            left = ", ".join(f"{what}: {count}" for what, count in counts.items() if count)
        if not left or time.monotonic() > end:
            return left
        time.sleep(POLL_S)


def _read(done: Run, life: Life) -> None:
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
            done.findings.append(answered.finding("failed", f"{record.error}: {record.message}"))
    if life.killed:
        done.killed += len(begun)
    else:
        done.findings += [Finding("hang", f"{life.path.stem} call {n}", f"{b.call}") for n, b in begun.items()]


def _is_excused(done: Run, answered: Answered) -> bool:
    """Past its deadline, and for half of that time or more there was no engine to sample it."""
    assert done.watch is not None
    outage_s = done.watch.outage_s(answered.begun_at, answered.ended_at)
    return answered.error == "DeadlineError" and outage_s > TIMEOUT_S / 2
