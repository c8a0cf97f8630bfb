"""Runs chaos once: a separate cluster, load, events, and the checks afterwards."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from ray import serve

from benchmarks.chaos.agents import Agents
from benchmarks.chaos.calls import TIMEOUT_S
from benchmarks.chaos.checks import LATE_S, Finding, check, check_references
from benchmarks.chaos.faults import Faults, NoVictim, Strike
from benchmarks.chaos.load import Life, Trainers
from benchmarks.chaos.publisher import UPDATE_TIMEOUT_S, Publisher
from benchmarks.chaos.record import ENGINES, Event, Options, Run, read, read_sessions
from benchmarks.chaos.reference import Reference
from benchmarks.chaos.scorers import FakeScorer, TransformersScorer
from benchmarks.chaos.turns import CONTEXT
from benchmarks.chaos.watch import Watch
from benchmarks.common.engines import EngineArgs
from tests.support.deploy import deploy
from tests.support.gateway import gateway_url
from tests.support.ray_cluster import ray_cluster
from twinkle_serve.sampler import RunningSampler

APPLICATION = "chaos"
ENGINE_ARGS: dict[str, EngineArgs] = {
    "vllm": {
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "kv_cache_memory_bytes": 2**28,
        "enable_lora": True,
        "max_loras": 4,
        "max_lora_rank": 8,
    },
    "fake": {"max_model_len": CONTEXT, "token_latency_s": 0.02},
}
OBJECT_STORE_BYTES = 2**27
POLL_S = 0.1
IDLE_S = 30.0
"""Time after the last call within which the service must be idle."""


def run(options: Options) -> Run:
    """Deploys a service, runs all phases, and checks every response."""
    done = Run(options)
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        # Two cores more than the engines': router, store and trainers request next to nothing.
        with ray_cluster(num_cpus=ENGINES + 2, with_http=True, object_store_memory=OBJECT_STORE_BYTES):
            lives = _deployed(done, Path(directory))
        for life in lives:
            read(done, life)
    read_sessions(done)
    for answered in done.calls:
        done.findings += check(answered, done.history)
    differences, done.compared = check_references(done.calls)
    done.findings += differences
    print(f"scoring the samples of {len(done.calls)} calls ...", flush=True)
    done.reference = Reference(done.history, TransformersScorer() if options.engine == "vllm" else FakeScorer())
    done.findings += done.reference.check(done.calls, options.share, random.Random(options.seed))
    scored = done.reference.samples
    done.findings += done.reference.check(done.turns, 1.0, random.Random(options.seed))
    done.turns_scored = done.reference.samples - scored
    return done


def _deployed(done: Run, directory: Path) -> list[Life]:
    """Deploys the service and a gateway, and runs the phases that need them. Returns all trainers."""
    sampler = deploy(
        APPLICATION,
        engine=done.options.engine,
        device_mesh={"dp_size": ENGINES},
        engine_args=ENGINE_ARGS[done.options.engine],
    )
    with gateway_url(samplers={"sampler": APPLICATION}) as url:
        return _disturb(done, directory, sampler, url)


def _disturb(done: Run, directory: Path, sampler: RunningSampler, url: str) -> list[Life]:
    """Runs the phases."""
    options = done.options
    agents = Agents(url, options.agents, options.seed)
    trainers = Trainers(APPLICATION, directory, options.seed, options.callers)
    rng = random.Random(options.seed)
    faults = Faults(APPLICATION, ENGINES, trainers, url, rng, cores=options.engine == "vllm")
    publisher = Publisher(sampler, done.history, options.publish_s)
    done.watch = watch = Watch(serve.get_app_handle(APPLICATION), ENGINES)
    watch.start()
    publisher.start()
    for life in [trainers.add() for _ in range(options.trainers)]:
        assert trainers.connected(life, timeout_s=60), f"{life.path.stem} did not connect"
    agents.start()
    time.sleep(options.warm_up_s)
    with done.phase("calm before"):
        time.sleep(options.calm_s)
    try:
        with done.phase("events"):
            _events(done, faults, watch, rng)
    finally:
        faults.end()
    with done.phase("calm after"):
        time.sleep(options.calm_s)
    agents.end()
    done.findings += [Finding("hang", "trainers", wrong) for wrong in trainers.stop(TIMEOUT_S + LATE_S)]
    done.findings += [Finding("hang", "agents", wrong) for wrong in agents.stop(TIMEOUT_S + LATE_S)]
    if not publisher.stop(UPDATE_TIMEOUT_S + LATE_S):
        done.findings.append(Finding("hang", "publisher", "an update or an adapter does not end"))
    done.sessions = agents.collect(sampler)
    if left := _left_behind(watch, faults):
        done.findings.append(Finding("left behind", "service", f"{IDLE_S:g} s after the last call: {left}"))
    watch.stop()
    return trainers.lives


def _events(done: Run, faults: Faults, watch: Watch, rng: random.Random) -> None:
    """Causes one event after another. Each kind comes once before any repeats."""
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
            _await_recovery(done, event, strike, watch)
        _tell(done, event)
    if options.overlapping:
        last = Event(kind="all engines ready", target="service", at=time.monotonic())
        _await_recovery(done, last, Strike("service", lambda: True), watch)


def _await_recovery(done: Run, event: Event, strike: Strike, watch: Watch) -> None:
    """Waits until the target is replaced and all engines are and stay ready; past the bound that is a finding."""
    over_at: float | None = None
    while (now := time.monotonic()) < event.at + done.options.bound_s:
        try:
            if over_at is None and strike.over():
                over_at = now
        except Exception as error:  # a trainer that cannot connect
            done.findings.append(Finding("failed", event.target, f"{type(error).__name__}: {error}"))
            over_at = now
        since = watch.all_ready_since()
        if over_at is not None and since is not None:
            recovered_at = max(since, over_at)
            if now - recovered_at > done.options.settled_s:
                event.recovered_s = recovered_at - event.at
                return
        time.sleep(POLL_S)
    if over_at is None:
        struck = f"not over: {'; '.join(strike.seen()) or 'no process'}"
    else:
        struck = f"over after {over_at - event.at:.1f} s"
    what = f"not all engines ready within {done.options.bound_s:g} s of: {event.kind}, {struck}; "
    done.findings.append(Finding("not recovered", event.target, what + watch.told(event.at)))


def _tell(done: Run, event: Event) -> None:
    after = f"{event.at - done.phases[0].end:6.1f} s"
    if event.recovered_s is not None:
        became = f"all engines ready after {event.recovered_s:.1f} s"
    else:
        became = "" if done.options.overlapping else f"NOT all engines ready within {done.options.bound_s:g} s"
    print(f"  {after}  {event.kind}: {event.target}  {became}", flush=True)


def _left_behind(watch: Watch, faults: Faults) -> str:
    """Describes work that an idle service still holds, and surplus processes; "" if there is nothing."""
    end = time.monotonic() + IDLE_S
    while True:
        status = watch.status()
        if status is None:
            left = "no status"
        else:
            held = {name: engine["sequences"] for name, engine in status["engines"].items() if engine["sequences"]}
            counts = {"requests": status["requests"], "groups_waiting": status["groups_waiting"], "sequences": held}
            left = ", ".join(f"{what}: {count}" for what, count in counts.items() if count) or faults.doubled()
        if not left or time.monotonic() > end:
            return left
        time.sleep(POLL_S)
