"""Updates of the model's own weights over two engines in this process: all of them, or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import eventually
from tests.support.slow_disk import SlowDisk
from tests.support.updatable_service import PARTS, QUESTIONS, Service
from twinkle_serve.data_format.weights import INITIAL_LABEL, WeightsVersion
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import DeadlineError, EngineDeadError, EngineError, RequestError, StoreError, WeightsError
from twinkle_serve.weights.model import ModelWeights


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr("twinkle_serve.timing.PROBE_PERIOD_S", 0.05)
    made = Service()
    await made.start()
    yield made
    await made.stop()


async def test_engine_that_refuses_keeps_all_on_the_version_before(service: Service) -> None:
    """The error names it; the other one, which had loaded the weights, is brought back; nobody stays paused."""
    await service.update("one")
    service.engines["b"].refuses.add("two")
    with pytest.raises(WeightsError, match=r"b: two is not to my taste\. 'one' is current"):
        await service.update("two")
    assert service.engines["a"].loads == ["one", "two", "one"]
    assert await service.labels() == {("a", "one"), ("b", "one")}
    assert not (await service.router.status())["paused"]
    service.engines["b"].refuses.clear()
    assert await service.update("two") == "two", "a label that never was current is free"
    assert await service.labels() == {("a", "two"), ("b", "two")}


async def test_engines_with_different_weights_are_an_error(service: Service) -> None:
    """By their checksums, both of which are named."""
    service.engines["b"].garbles.add("one")
    with pytest.raises(EngineError, match=r"different weights after they loaded 'one': a [0-9a-f]{8}, b other"):
        await service.update("one")
    assert await service.labels() == {("a", INITIAL_LABEL), ("b", INITIAL_LABEL)}


async def test_engine_that_hangs_ends_the_update_at_its_deadline(service: Service) -> None:
    """And both go on as before; they have as long for that."""
    service.engines["a"].hangs.add("one")
    with pytest.raises(DeadlineError, match=r"not loaded within 1 s for 'one'; 'initial' is current"):
        await service.update("one", timeout_s=1.0)
    assert await service.labels() == {("a", INITIAL_LABEL), ("b", INITIAL_LABEL)}


async def test_engine_that_is_not_replaced_has_time_to_go_back(service: Service) -> None:
    """More than the update had, which may be less than any load takes: without its engines, a sampler is at its end."""
    service.router._engines.engines_return = False
    for engine in service.engines.values():
        engine.hangs.add("one")
        engine.delays[INITIAL_LABEL] = 0.5
    with pytest.raises(DeadlineError, match=r"not loaded within 0.2 s for 'one'; 'initial' is current"):
        await service.update("one", timeout_s=0.2)
    assert await service.labels() == {("a", INITIAL_LABEL), ("b", INITIAL_LABEL)}


async def test_engine_that_cannot_go_back_is_not_used_until_it_can(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state says that it is behind; the other one samples everything meanwhile."""
    monkeypatch.setattr("twinkle_serve.routing.membership.MAX_FAILED_LOADS", 10_000)  # nobody replaces processes here
    await service.update("one")
    service.engines["b"].refuses |= {"one", "two"}
    with pytest.raises(WeightsError):
        await service.update("two")
    assert await service.labels() == {("a", "one")}
    assert (await service.router.status())["engines"]["b"]["state"] in ("dead", "catching up")
    service.engines["b"].refuses.clear()
    await service.ready()
    assert await service.labels() == {("a", "one"), ("b", "one")}


async def test_engine_that_never_catches_up_has_its_process_replaced(service: Service) -> None:
    """It fails its health checks, which is what Serve replaces it for."""
    await service.update("one")
    service.engines["b"].refuses |= {"one", "two"}
    with pytest.raises(WeightsError):
        await service.update("two")

    async def retired() -> bool:
        try:
            await service.servers["b"].check_health()
        except EngineError as error:
            return "does not load 'one'" in str(error)
        return False

    await eventually(retired)


async def test_engine_is_not_replaced_for_how_long_others_change_weights(service: Service) -> None:
    """It waits for its turn for longer than it may take to load."""
    membership = service.router._engines
    membership.load_timeout_s = 0.1
    async with membership.tracks.named("main").changing:
        membership.lose(membership.active["b"], EngineDeadError("it was out of reach"))
        await asyncio.sleep(0.3)  # three times that
    await service.ready()
    await service.servers["b"].check_health()
    assert await service.labels() == {("a", INITIAL_LABEL), ("b", INITIAL_LABEL)}


async def test_update_whose_trainer_is_silent_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buckets are gone from the store, and the next trainer is taken."""
    monkeypatch.setattr("twinkle_serve.timing.UPLOAD_LEASE_S", 0.1)
    upload = await service.router.begin_weights("one", "keep")
    await service.router.append_weights(upload, 0, PARTS[0])
    memory: dict[str, Any] = service.store._store.model._memory
    assert memory

    async def forgotten() -> bool:
        return not memory

    await eventually(forgotten)
    with pytest.raises(StoreError, match="given up"):
        await service.router.append_weights(upload, 1, PARTS[1])
    assert await service.update("one") == "one"


async def test_caller_that_gives_up_leaves_an_update_whole(service: Service) -> None:
    """Cancelled once the engines are at it, the update ends as if it had not been."""
    upload = await service.router.begin_weights("one", "keep")
    for index, part in enumerate(PARTS):
        await service.router.append_weights(upload, index, part)
    call = asyncio.ensure_future(service.router.publish_weights(upload, "keep", 30.0))
    await asyncio.sleep(0)
    call.cancel()

    async def updated() -> bool:
        status = await service.router.status()
        return status["weights"] == "one" and not status["paused"]

    await eventually(updated)
    assert await service.labels() == {("a", "one"), ("b", "one")}


async def test_engine_that_hangs_for_good_is_given_up(service: Service) -> None:
    """It neither takes the new weights nor goes back: the update ends, and the other engine samples on."""
    service.engines["b"].hangs |= {"one", INITIAL_LABEL}
    with pytest.raises(DeadlineError):
        await service.update("one", timeout_s=1.0)
    assert await service.labels() == {("a", INITIAL_LABEL)}
    service.engines["b"].hangs.clear()
    service.engines["b"].let_go.set()  # the router may have tried again by now
    await service.ready()
    assert await service.update("two") == "two"
    assert await service.labels() == {("a", "two"), ("b", "two")}


async def test_commit_whose_answer_is_lost_counts(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store died behind it: what it has is asked for, and is what the engines have."""
    commit = service.store.commit_weights

    async def answer_lost(version: WeightsVersion, track: str) -> None:
        await commit(version, track)
        raise StoreError("the store did not answer.")

    monkeypatch.setattr(service.store, "commit_weights", answer_lost)
    assert await service.update("one") == "one"
    assert await service.labels() == {("a", "one"), ("b", "one")}


async def test_router_that_was_wrong_about_the_current_version_learns(service: Service) -> None:
    """The store has gone on to another one than it knows: engines that fetch the old one fail, and it asks."""
    await service.update("one")
    track = service.router._engines.tracks.named("main")
    old = track.weights
    await service.update("two")
    track.weights = old
    await service.ready_with("two")
    assert await service.labels() == {("a", "two"), ("b", "two")}


async def test_resume_whose_caller_gives_up_resumes(service: Service) -> None:
    """While something else has its turn with the engines."""
    track = service.router._engines.tracks.named("main")
    lease = await service.router.pause("keep", 30.0)
    await track.changing.acquire()
    call = asyncio.ensure_future(service.router.resume(lease))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait({call})
    track.changing.release()

    async def resumed() -> bool:
        return not (await service.router.status())["paused"]

    await eventually(resumed)
    assert await service.labels() == {("a", INITIAL_LABEL), ("b", INITIAL_LABEL)}


async def test_update_that_finds_no_turn_ends_at_its_deadline(service: Service) -> None:
    """It does not become current later, behind the caller's back."""
    async with service.router._engines.tracks.named("main").changing:
        with pytest.raises(DeadlineError, match="another pause begins or ends"):
            await service.update("one", timeout_s=0.1)
    assert await service.labels() == {("a", INITIAL_LABEL), ("b", INITIAL_LABEL)}


async def test_asleep_sampler_takes_no_weights_and_a_paused_one_does_not_sleep(service: Service) -> None:
    """Each would undo the other."""
    await service.router.sleep(1)
    with pytest.raises(RequestError, match="asleep"):
        await service.update("one")
    with pytest.raises(RequestError, match="asleep"):
        await service.router.pause("keep", 1.0)
    await service.router.wake_up()
    lease = await service.router.pause("keep", 30.0)
    with pytest.raises(RequestError, match="paused"):
        await service.router.sleep(1)
    await service.router.resume(lease)
    await service.update("one")


async def test_engine_that_dies_as_an_update_begins_does_not_fail_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one tells which weights the model has."""
    asked = []

    async def dying(self: EngineServer) -> Any:
        asked.append(self)
        raise EngineDeadError("it died.")

    first = next(iter(service.router._engines.active))
    monkeypatch.setattr(service.servers[first], "model_spec", dying.__get__(service.servers[first]))
    assert await service.update("one") == "one"
    assert asked
    await service.ready()
    assert await service.labels() == {("a", "one"), ("b", "one")}


async def test_sleep_that_drops_the_weights_wakes_up_with_the_current_ones(service: Service) -> None:
    """Level 2."""
    await service.update("one")
    before = await service.router.sample(QUESTIONS, {"temperature": 0, "max_tokens": 4})
    await service.router.sleep(2)
    await service.router.wake_up(["weights"])
    await service.router.wake_up(["kv_cache"])
    after = await service.router.sample(QUESTIONS, {"temperature": 0, "max_tokens": 4})
    assert after.columns.tokens.tolist() == before.columns.tokens.tolist()
    assert {loads.count("one") for loads in (engine.loads for engine in service.engines.values())} == {2}


async def test_staleness_counts_versions_since_the_oldest_span(service: Service) -> None:
    """Of the model's own weights, where a request has no adapter."""
    seen: list[tuple[str, int]] = []
    service.router._telemetry.stale = lambda adapter, versions: seen.append((adapter, versions))  # type: ignore[method-assign]
    for engine in service.engines.values():
        engine._args = engine._args.model_copy(update={"token_latency_s": 0.02})
    call = asyncio.ensure_future(service.router.sample(QUESTIONS, {"max_tokens": 60, "ignore_eos": True}))
    for engine in service.engines.values():
        engine.steps = 0

    async def begun() -> bool:
        return all(engine.steps for engine in service.engines.values())

    await eventually(begun)
    await service.update("one")
    await service.update("two")
    await call
    assert seen == [("", 2)]


@pytest.fixture
def disk(service: Service, tmp_path: Path) -> SlowDisk:
    """That of the service."""
    disk = SlowDisk(tmp_path)
    service.store._store.model = ModelWeights(disk, keep=2)
    return disk


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("error", ["cannot be written", "killed"])
async def test_version_that_is_not_written_gives_way_to_the_one_before(
    service: Service, disk: SlowDisk, durable: bool, error: str
) -> None:
    """Samples had it meanwhile. Afterwards every engine has the one before, and nothing is paused."""
    await service.update("one")
    disk.go.clear()
    call = asyncio.create_task(service.update("two", durable=durable))
    await service.ready_with("two")
    assert await service.labels() == {("a", "two"), ("b", "two")}
    if not durable:
        assert await call == "two"
    if error == "killed":
        service.store._store.model = ModelWeights(disk.as_after_a_kill())
        said = r"version 'two' was not written: the store ended before that; 'one' is current again"
    else:
        disk.is_full = True
        said = r"cannot be written: no space left on device; 'one' is current again"
    disk.go.set()
    if durable:
        with pytest.raises(StoreError, match=said):
            await call
    await service.ready_with("one")
    assert await service.labels() == {("a", "one"), ("b", "one")}
    assert not (await service.router.status())["paused"]
    failures = [event["text"] for event in service.router._telemetry.report(0.0)["events"] if "failed" in event["text"]]
    assert len(failures) == 1 and "'one' is current again" in failures[0]
    disk.is_full = False
    assert await service.update("three") == "three"
    assert await service.labels() == {("a", "three"), ("b", "three")}


async def test_update_that_is_not_written_in_time_is_undone(service: Service, disk: SlowDisk) -> None:
    """As one that cannot be written."""
    disk.go.clear()
    with pytest.raises(DeadlineError, match=r"did not write 'one' within 0\.5 s; 'initial' is current again"):
        await service.update("one", timeout_s=0.5)
    disk.go.set()
    assert await service.labels() == {("a", INITIAL_LABEL), ("b", INITIAL_LABEL)}
    assert await service.update("two") == "two"


async def test_engines_that_cannot_go_back_are_not_used_until_they_have(
    service: Service, disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sample is of a version that was given up."""
    monkeypatch.setattr("twinkle_serve.routing.membership.MAX_FAILED_LOADS", 10_000)  # nobody replaces processes here
    await service.update("one")
    disk.go.clear()
    call = asyncio.create_task(service.update("two"))
    await service.ready_with("two")
    for engine in service.engines.values():
        engine.refuses.add("one")
    disk.is_full = True
    disk.go.set()
    with pytest.raises(StoreError, match="'one' is current again"):
        await call
    assert not {label for _, label in await service.labels_within(0.3)}
    for engine in service.engines.values():
        engine.refuses.clear()
    await service.ready_with("one")
    assert await service.labels() == {("a", "one"), ("b", "one")}


async def test_next_update_waits_until_the_last_one_is_written(service: Service, disk: SlowDisk) -> None:
    """Else the memory of versions that wait for a slow disk would have no bound."""
    disk.go.clear()
    await service.update("one", durable=False)
    begin = asyncio.create_task(service.router.begin_weights("two", "keep"))
    await asyncio.wait([begin], timeout=0.2)
    assert not begin.done()
    disk.go.set()
    await service.router.abandon_weights(await begin)


async def test_version_that_is_kept_is_used_again(service: Service, disk: SlowDisk) -> None:
    """And samples say so. The checkpoint is always kept."""
    for label in ("one", "two"):
        await service.update(label)
    assert (await service.router.status())["weights_versions"] == [INITIAL_LABEL, "one", "two"]
    for label in ("one", INITIAL_LABEL, "two", "two"):
        assert await service.router.use_weights(label, "keep", 30.0) == label
        assert await service.labels() == {("a", label), ("b", label)}
    with pytest.raises(WeightsError, match="'three' is unknown; the store has 'initial', 'one', 'two'"):
        await service.router.use_weights("three", "keep", 30.0)
    service.engines["b"].refuses.add("one")
    with pytest.raises(WeightsError, match=r"b: one is not to my taste\. 'two' is current"):
        await service.router.use_weights("one", "keep", 30.0)
    assert await service.labels() == {("a", "two"), ("b", "two")}
    await service.update("three")
    assert (await service.router.status())["weights_versions"] == [INITIAL_LABEL, "two", "three"]
