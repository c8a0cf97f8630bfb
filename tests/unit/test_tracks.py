"""Tracks over three engines in this process: a and b in `old`, c in `new`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.eventually import eventually
from tests.support.failing_service import POISON, PROMPTS, Service, exact
from tests.support.lora import random_adapter
from twinkle_serve import hub
from twinkle_serve.adapters import pack_adapter
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.weights import INITIAL_LABEL
from twinkle_serve.errors import (
    AdapterError,
    ConfigError,
    DeadlineError,
    EngineDeadError,
    PoisonPromptError,
    QueueFullError,
    RequestError,
    WeightsError,
)
from twinkle_serve.packing import buckets
from twinkle_serve.routing.router import Router

MANY = {"max_tokens": 8, "ignore_eos": True, "seed": 3}
PARTS = list(buckets(named_tensors(hub.DEMO), 2**20))
ARGS: dict[str, Any] = {"device_mesh": {"dp_size": 3}, "tracks": {"old": 2, "new": 1}, "max_queued_requests": 4}
KILLED = EngineDeadError("killed")


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr("twinkle_serve.timing.PROBE_PERIOD_S", 0.05)
    made = Service(("a", "b", "c"), **ARGS)
    await made.start()
    yield made
    await eventually(made.idle)
    await made.stop()


async def update(router: Router, label: str, track: str = "") -> str:
    upload = await router.begin_weights(label, "keep", track=track)
    for index, part in enumerate(PARTS):
        await router.append_weights(upload, index, part)
    return await router.publish_weights(upload, "keep", 30.0)


def engines(response: SampleResponse) -> set[str]:
    return set(response.columns.engine)


def labels(response: SampleResponse) -> set[str]:
    return {span.version for sequence in response.sequences for span in sequence.weight_versions}


async def ready(service: Service, *names: str) -> None:
    async def all_ready() -> bool:
        status = await service.router.status()
        return all(status["engines"][name]["state"] == "ready" for name in names)

    await eventually(all_ready)


async def lose(service: Service, name: str) -> None:
    """Ends an engine for as long as the test does not let it come back."""
    service.kept_down.add(name)
    service.engines[name].end(KILLED)
    await eventually(lambda: name not in service.router._engines.active)


async def test_call_is_sampled_by_the_engines_of_its_track(service: Service) -> None:
    """The first track's, unless it names another one, or an engine."""
    router = service.router
    assert engines(await router.sample(PROMPTS, MANY)) == {"a", "b"}
    for track, expected in (("old", {"a", "b"}), ("new", {"c"})):
        assert engines(await router.sample(PROMPTS, MANY, num_samples=2, track=track)) == expected
        parts = [part async for part in router.sample_iter(PROMPTS, MANY, track=track)]
        assert {name for part in parts for name in engines(part)} == expected
    assert engines(await router.sample(PROMPTS, MANY, engine="c")) == {"c"}
    assert [delta async for delta in router.sample_stream(PROMPTS[0], MANY, track="new")][-1][1] == "length"
    status = await router.status()
    assert {name: engine["track"] for name, engine in status["engines"].items()} == {"a": "old", "b": "old", "c": "new"}
    assert status["tracks"] == {"old": INITIAL_LABEL, "new": INITIAL_LABEL}


async def test_track_that_is_none_is_refused_at_once(service: Service) -> None:
    """Whether or not an engine could sample the call."""
    for name in ("a", "b", "c"):
        await lose(service, name)
    unknown: Any
    for unknown in ("newer", None, 1):
        with pytest.raises(RequestError, match=r"unknown track '.*'.*new.*old"):
            await service.router.sample(PROMPTS, MANY, track=unknown)
    with pytest.raises(RequestError, match="unknown engine"):
        await service.router.sample(PROMPTS, MANY, engine=["c"])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="c belongs to track 'new', and the call names track 'old'"):
        await service.router.sample(PROMPTS, MANY, track="old", engine="c")
    with pytest.raises(RequestError, match="unknown track 'newer'"):
        await service.router.begin_weights("one", "keep", track="newer")
    service.kept_down.clear()


async def test_update_pauses_and_changes_one_track(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one samples while engines load; each sample names its track's version."""
    engine, loading, go_on = service.engines["c"], asyncio.Event(), asyncio.Event()
    load = engine.load_weights

    async def held(label: str, parts: Any) -> str:
        loading.set()
        await go_on.wait()
        return await load(label, parts)

    monkeypatch.setattr(engine, "load_weights", held)
    call = asyncio.create_task(update(service.router, "one", "new"))
    await loading.wait()
    assert not any(service.servers[name]._paused for name in ("a", "b")) and service.servers["c"]._paused
    during = await service.router.sample(PROMPTS, MANY, num_samples=2)
    assert labels(during) == {INITIAL_LABEL} and not call.done()
    go_on.set()
    assert await call == "one"
    assert labels(await service.router.sample(PROMPTS, MANY, track="new")) == {"one"}
    assert labels(await service.router.sample(PROMPTS, MANY, track="old")) == {INITIAL_LABEL}
    status = await service.router.status()
    assert status["tracks"] == {"old": INITIAL_LABEL, "new": "one"} and status["weights"] == INITIAL_LABEL
    assert {name: engine["weights"] for name, engine in status["engines"].items()} == {
        **dict.fromkeys(("a", "b"), INITIAL_LABEL),
        "c": "one",
    }
    with pytest.raises(WeightsError, match="'one' exists already"):
        await update(service.router, "one", "old")
    assert await update(service.router, "two") == "two"
    assert labels(await service.router.sample(PROMPTS, MANY)) == {"two"}
    assert labels(await service.router.sample(PROMPTS, MANY, track="new")) == {"one"}
    assert "one is current on track new: " in [e["text"][:29] for e in (await service.router.telemetry())["events"]]


async def test_engine_of_one_track_comes_into_use_while_another_is_updated(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, loading, go_on = service.engines["c"], asyncio.Event(), asyncio.Event()
    load = engine.load_weights

    async def held(label: str, parts: Any) -> str:
        loading.set()
        await go_on.wait()
        return await load(label, parts)

    monkeypatch.setattr(engine, "load_weights", held)
    call = asyncio.create_task(update(service.router, "one", "new"))
    await loading.wait()
    for name in ("a", "b"):
        service.engines[name].end(KILLED)
    response = await service.router.sample(PROMPTS, MANY)
    await ready(service, "a", "b")
    assert exact(response, len(PROMPTS), 1) and not call.done()
    go_on.set()
    await call


async def test_pause_of_a_caller_holds_every_track(service: Service) -> None:
    """Also those of a track that is updated meanwhile; and an update of one leaves the pause in force."""
    pause = await service.router.pause("keep", 30.0)
    assert all(server._paused for server in service.servers.values())
    await update(service.router, "one", "new")
    assert all(server._paused for server in service.servers.values())
    await service.router.resume(pause)
    assert labels(await service.router.sample(PROMPTS, MANY, track="new")) == {"one"}
    assert not any(server._paused for server in service.servers.values())


@pytest.mark.parametrize("failover", ["restart", "resume"])
async def test_failover_stays_in_the_track(failover: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine takes the work of the other; without any, it waits, though another track is idle."""
    monkeypatch.setattr("twinkle_serve.timing.PROBE_PERIOD_S", 0.05)
    service = Service(("a", "b", "c"), **ARGS, failover=failover)
    await service.start()
    for name in ("a", "b"):
        service.engines[name].gate = asyncio.Event()
    call = asyncio.create_task(service.router.sample(PROMPTS[:4], {"max_tokens": 8}, num_samples=4, timeout_s=60))
    await eventually(lambda: all(service.engines[name].sampled for name in ("a", "b")))
    for name in ("a", "b"):
        await lose(service, name)
        service.engines[name].gate = None
    assert engines(await service.router.sample(PROMPTS, MANY, track="new")) == {"c"}
    sampled = service.engines["c"].sampled.total()
    assert not call.done()
    service.kept_down.clear()
    response = await call
    assert exact(response, 4, 4) and engines(response) <= {"a", "b"}
    assert service.engines["c"].sampled.total() == sampled == len(PROMPTS)
    await service.stop()


async def test_call_of_a_track_without_engines_ends_at_its_deadline(service: Service) -> None:
    """The error says which track; the other one, and its queue, are not touched by those that wait."""
    await lose(service, "c")
    waiting = [asyncio.create_task(service.router.sample(PROMPTS, MANY, track="new", timeout_s=2.0)) for _ in range(4)]
    await eventually(lambda: len(service.router._requests) == 4 * len(PROMPTS))
    with pytest.raises(QueueFullError):
        await service.router.sample(PROMPTS, MANY, track="new")
    assert exact(await service.router.sample(PROMPTS, MANY, num_samples=2), len(PROMPTS), 2)
    for call in waiting:
        with pytest.raises(DeadlineError, match="0 of 32 samples were done; 0 of 1 engines of track 'new' are up"):
            await call
    with pytest.raises(DeadlineError, match="0 of 1 engines of track 'new' are up"):
        async for _ in service.router.sample_stream(PROMPTS[0], MANY, track="new", timeout_s=0.1):
            pass
    with pytest.raises(DeadlineError, match=r"0 of 1 engines of track 'new' are up.*'initial' is current"):
        upload = await service.router.begin_weights("one", "keep", track="new")
        for index, part in enumerate(PARTS):
            await service.router.append_weights(upload, index, part)
        await service.router.publish_weights(upload, "keep", 0.1)
    service.kept_down.clear()
    assert engines(await service.router.sample(PROMPTS, MANY, track="new")) == {"c"}


async def test_prompt_that_ends_engines_reaches_none_of_another_track(service: Service) -> None:
    """It fails by name on its own track; the suspects beside it are sampled there."""
    bystander = asyncio.create_task(service.router.sample(PROMPTS, {"max_tokens": 8}, num_samples=4))
    with pytest.raises(PoisonPromptError, match=r"was on [ab], [ab] when"):
        await service.router.sample([{"input_ids": [POISON, 20, 21]}], {"max_tokens": 4})
    response = await bystander
    assert exact(response, len(PROMPTS), 4) and engines(response) <= {"a", "b"}
    assert not service.engines["c"].sampled


async def test_engine_that_returns_has_the_weights_of_its_track(service: Service) -> None:
    """By itself when it starts, and by the router if it holds those of another track."""
    await update(service.router, "one", "new")
    await update(service.router, "two", "old")
    for name in ("a", "c"):
        service.engines[name].end(KILLED)
    await eventually(lambda: service.restarts == 2)
    await ready(service, "a", "c")
    versions = {name: server._weights.version for name, server in service.servers.items()}
    assert {name: version and version.label for name, version in versions.items()} == {
        "a": "two",
        "b": "two",
        "c": "one",
    }
    wrong, right = versions["a"], versions["c"]
    assert wrong is not None
    await service.servers["c"].load_weights(wrong)
    await eventually(lambda: service.servers["c"]._weights.version == right)
    assert labels(await service.router.sample(PROMPTS, MANY, track="new")) == {"one"}


async def test_router_that_begins_finds_the_version_of_each_track(service: Service) -> None:
    """Also for a track that is new to it, and for one that it no longer has."""
    await update(service.router, "one", "new")
    await update(service.router, "two", "old")
    service.router.close()
    for tracks, expected in (
        ({"old": 2, "new": 1}, {"old": "two", "new": "one"}),
        ({"newest": 1, "new": 2}, {"newest": INITIAL_LABEL, "new": "one"}),
    ):
        args = ServiceArgs.model_validate({"model_id": "demo", "engine": "fake", **ARGS, "tracks": tracks})
        router = Router(args, hub.DEMO, service.servers, service.store)
        await router.start()
        assert (await router.status())["tracks"] == expected
        router.close()
    service.router = Router(service.args, hub.DEMO, service.servers, service.store)
    await service.router.start()
    await ready(service, "a", "b", "c")
    assert labels(await service.router.sample(PROMPTS, MANY, track="new")) == {"one"}


async def test_engine_that_changes_its_track_loads_what_that_has(service: Service) -> None:
    """As an engine that is removed, and a new one of the same name; the tracks are those of the config."""
    await update(service.router, "one", "new")
    service.router.set_engines(service.servers, {"a": "old", "b": "new", "c": "new"})
    assert engines(await service.router.sample(PROMPTS, MANY)) == {"a"}
    await ready(service, "a", "b", "c")
    response = await service.router.sample(PROMPTS, MANY, num_samples=2, track="new")
    assert engines(response) == {"b", "c"} and labels(response) == {"one"}
    assert engines(await service.router.sample(PROMPTS, MANY)) == {"a"}


async def test_staleness_counts_the_versions_of_the_track(service: Service) -> None:
    """Those of another track make no sample older."""
    tracks = service.router._engines.tracks
    await update(service.router, "one", "new")
    await update(service.router, "two", "new")
    await update(service.router, "three", "old")
    assert tracks.named("new").staleness({INITIAL_LABEL}) == 2
    assert tracks.named("new").staleness({"one", "two"}) == 1
    assert tracks.named("old").staleness({INITIAL_LABEL}) == 1
    assert tracks.named("old").staleness({"three"}) == 0
    assert tracks.describe() == "old three, new two"


async def test_adapter_with_tensors_of_the_model_needs_one_version_for_all_tracks(service: Service) -> None:
    """It would be right in one of them. Without such tensors it is for all."""
    model = random_adapter(modules=("q_proj",))
    config, state = model.peft_config["default"], model.state_dict()
    own = {name: tensor for name, tensor in state.items() if "lora_" in name}
    assert await service.router.add_adapter("policy", pack_adapter(config, state)) == "policy@1"
    await update(service.router, "one", "new")
    with pytest.raises(AdapterError, match="the tracks have different weights: old initial, new one"):
        await service.router.add_adapter("policy", pack_adapter(config, state))
    label = await service.router.add_adapter("policy", pack_adapter(config, own))
    for track in ("old", "new"):
        response = await service.router.sample(PROMPTS, MANY, "policy", track=track)
        assert set(response.columns.adapter) == {label}


async def test_requests_are_bounded_for_each_track(service: Service) -> None:
    """Streams too, which are in no queue."""
    await lose(service, "c")

    async def stream() -> None:
        async for _ in service.router.sample_stream(PROMPTS[0], MANY, track="new", timeout_s=0.5):
            pass

    streams = [asyncio.create_task(stream()) for _ in range(4)]
    await eventually(lambda: service.router._admission.running == 4)
    with pytest.raises(QueueFullError):
        await stream()
    assert exact(await service.router.sample(PROMPTS, MANY), len(PROMPTS), 1)
    for each in streams:
        with contextlib.suppress(DeadlineError):
            await each
    service.kept_down.clear()


@pytest.mark.parametrize(
    ("tracks", "message"),
    [
        ({"old": 1, "new": 1}, "tracks has 2 engines, and device_mesh.dp_size is 3"),
        ({"old": 3, "new": 0}, "tracks.new: Input should be greater than or equal to 1, got 0"),
        ({"": 3}, "at least 1 character"),
        ({}, "at least 1 item"),
    ],
)
def test_tracks_that_do_not_fit_are_refused(tracks: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceArgs.model_validate({"model_id": "demo", **ARGS, "tracks": tracks})


def test_engines_are_assigned_in_order() -> None:
    args = ServiceArgs.model_validate({"model_id": "demo", **ARGS})
    assert args.tracks_of(["engine-dp0", "engine-dp1", "engine-dp2"]) == {
        "engine-dp0": "old",
        "engine-dp1": "old",
        "engine-dp2": "new",
    }
    assert ServiceArgs(model_id="demo").tracks_of(["only"]) == {"only": "main"}
