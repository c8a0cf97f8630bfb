"""Weights that a trainer sends to the engines itself, by a transfer with the interface of vLLM's: under the same pause,
with the same outcomes, as those that engines load from the store. `test_weight_faults` has the faults of both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import eventually
from tests.support.faulty_updates import DIRECT, Case, everyone_has, fails_and_heals, faulty_update
from tests.support.transfers import KIND, FakeSender, Trainer, client_of, flipped
from tests.support.updatable_service import PARTS, Service
from twinkle_serve import hub, timing
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.weights import (
    PauseMode,
    TransferCall,
    TransferOffer,
    TransferPlan,
    TransferStep,
    TransferTarget,
)
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import (
    DeadlineError,
    EngineDeadError,
    EngineError,
    StoreError,
    TwinkleServeError,
    UnsupportedError,
    WeightsError,
)
from twinkle_serve.routing.router import Router
from twinkle_serve.sampler.direct_transport import WeightSyncClient
from twinkle_serve.sampler.transports import UpdateRequest
from twinkle_serve.sampler.weight_upload import WeightUploads

NORM = "model.norm.weight"
TRAINERS_STEPS = ("init", "start", "update", "middle", "finish")
"""Steps of a transfer; "middle": some of the weights have been sent."""
CALLS: tuple[TransferCall, ...] = ("init", "start", "update", "finish")


@pytest.fixture(params=DIRECT)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def case(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Case]:
    async with faulty_update(way, tmp_path, monkeypatch) as made:
        yield made


def trainer_of(case: Case) -> Trainer:
    assert case.trainer is not None
    return case.trainer


def count_fetches(case: Case) -> list[str]:
    """Labels of the versions that engines fetch from the store, each time."""
    fetched: list[str] = []
    bucket = case.service.store.bucket

    async def noticed(version: Any, index: int) -> Any:
        fetched.append(version.label)
        return await bucket(version, index)

    case.replace(case.service.store, "bucket", noticed)
    return fetched


def at_call(case: Case, server: EngineServer, call: TransferCall, act: Any) -> None:
    """Has an engine do something else at a call of the trainer, once."""
    acted: list[bool] = []
    transfer, finish = server.transfer_weights, server.finish_transfer

    async def transfers(step: TransferStep) -> None:
        if step.call == call and not acted:
            acted.append(True)
            await act()
        await transfer(step)

    async def finishes(*args: Any) -> str:
        if call == "finish" and not acted:
            acted.append(True)
            await act()
        return await finish(*args)

    case.replace(server, "transfer_weights", transfers)
    case.replace(server, "finish_transfer", finishes)


async def dies() -> None:
    raise EngineDeadError("it died.")


async def test_engines_take_weights_from_the_trainer(case: Case) -> None:
    """They fetch none from the store, which has them all the same, for engines that come later."""
    fetched = count_fetches(case)
    assert await case.update("two") == "two"
    await everyone_has(case, "two")
    assert fetched == []
    assert {engine.loads[-1] for engine in case.service.engines.values()} == {"two"}
    server = case.service.servers["b"]
    await server.pause("keep")
    await server.load_weights(await case.service.store.current_weights("main"))
    assert set(fetched) == {"two"}, "the same weights, from the store"


async def test_connection_serves_until_engines_change(case: Case) -> None:
    """An engine's new process has to be connected to; the others are connected to again."""
    receivers = [engine.receiver for engine in case.service.engines.values()]
    assert [receiver.inits for receiver in receivers] == [1, 1]
    await case.update("two")
    assert [receiver.inits for receiver in receivers] == [1, 1]
    server = case.service.servers["b"]
    server._info = replace(server._info, incarnation="another")
    await eventually(lambda: case.service.router._engines.active["b"].info.incarnation == "another")
    await case.update("three")
    await everyone_has(case, "three")
    assert [receiver.inits for receiver in receivers] == [2, 2]
    assert {receiver.side.rank for receiver in receivers} == {1, 2}, "each worker has its own number"


async def test_trainers_take_turns(case: Case) -> None:
    """Engines are connected to one at a time: the others connect again."""
    first = trainer_of(case)
    second = Trainer(first.client, by_handles=first.by_handles)
    for trainer, label in ((second, "two"), (first, "three"), (first, "four"), (second, "five")):
        case.trainer = trainer
        await case.update(label)
        await everyone_has(case, label)
    assert [engine.receiver.inits for engine in case.service.engines.values()] == [4, 4]


# -- the trainer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", TRAINERS_STEPS)
async def test_trainer_that_fails(case: Case, step: str) -> None:
    """At any step, also while engines wait for it in a collective: its error is that of the update."""
    trainer = trainer_of(case)
    if step == "init":
        trainer.transports.disconnect()
    trainer.fails_at = step
    case.undo.append(lambda: setattr(trainer, "fails_at", ""))
    said = rf"the trainer could not send: RuntimeError: out of memory before {step}\. 'one' is current"
    await fails_and_heals(case, WeightsError, said, case.update("two"))


async def begun(case: Case, calls: int, mode: PauseMode = "keep") -> asyncio.Task[str]:
    """Publishes version `two` from a trainer that makes only some of its calls. Returns the call that publishes."""
    router = case.service.router
    targets = (await router.offer_weights(KIND)).targets
    upload = await router.begin_weights("two", mode, direct=True)
    for index, part in enumerate(PARTS):
        await router.append_weights(upload, index, part)
    publishing = asyncio.ensure_future(router.publish_weights(upload, mode, 20, TransferPlan(targets, {})))
    await eventually(lambda: bool(router._updates._update and router._updates._update.publishing))
    sender = trainer_of(case).sender
    assert sender is not None
    infos = {"init": {"master_address": sender.address, "rank_offset": 1, "world_size": 3}}
    infos["update"] = {"names": [], "shapes": []}
    for receiver in (engine.receiver for engine in case.service.engines.values()):
        receiver.side.shutdown()
    for call in CALLS[:calls]:
        await router.transfer_weights(upload, call, infos.get(call))
    return publishing


@pytest.mark.parametrize("calls", range(4))
async def test_trainer_that_is_killed(case: Case, calls: int) -> None:
    """After any of its calls: the engines wait for it for a while, and go on with the version before."""
    case.monkeypatch.setattr(timing, "UPLOAD_LEASE_S", 0.3)
    case.undo.append(trainer_of(case).transports.disconnect)
    publishing = await begun(case, calls)
    said = r"the trainer sent the engines nothing for 0.3 s, and they wait for it\. 'one' is current"
    await fails_and_heals(case, WeightsError, said, publishing)


@pytest.mark.parametrize("calls", range(4))
async def test_trainer_whose_call_is_cancelled(case: Case, calls: int) -> None:
    """As its cluster does when it ends: the engines go on at once."""
    publishing = await begun(case, calls)
    publishing.cancel()
    trainer_of(case).transports.disconnect()
    await eventually(lambda: case.service.router._updates._update is None)
    await everyone_has(case, "one")
    assert await case.update("two") == "two"
    await everyone_has(case, "two")


@pytest.mark.parametrize("at", ["seal", "pause"])
@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_trainer_that_gives_up_before_engines_are_paused(case: Case, mode: PauseMode, at: str) -> None:
    """The update is over at once, and has changed nothing."""
    service, reached, never = case.service, asyncio.Event(), asyncio.Event()

    async def waits(*args: Any) -> None:
        reached.set()
        await never.wait()

    if at == "seal":
        case.replace(service.store, "seal_weights", waits)
    else:
        case.replace(service.servers["a"], "pause", waits)
    publishing = await begun(case, 0, mode)
    await reached.wait()
    publishing.cancel()
    await asyncio.wait_for(eventually(lambda: service.router._updates._update is None), 5)
    for undo in case.undo:
        undo()
    await everyone_has(case, "one")
    assert {engine.loads[-1] for engine in service.engines.values()} == {"one"}, "nobody had to go back"
    trainer_of(case).transports.disconnect()
    assert await case.update("two") == "two"
    await everyone_has(case, "two")


async def test_calls_of_an_update_that_is_never_published(case: Case) -> None:
    """They end with it."""
    case.monkeypatch.setattr(timing, "UPLOAD_LEASE_S", 0.3)
    router = case.service.router
    upload = await router.begin_weights("two", "keep", direct=True)
    with pytest.raises(StoreError, match="given up: its trainer was silent"):
        await asyncio.wait_for(router.transfer_weights(upload, "start"), 10)
    await everyone_has(case, "one")


async def test_weights_that_differ_from_the_store(case: Case) -> None:
    """In one bit."""
    trainer = trainer_of(case)
    trainer.changes[NORM] = flipped(dict(named_tensors(hub.DEMO))[NORM])
    case.undo.append(trainer.changes.clear)
    said = rf"1 of the 46 weights from the trainer are not those of the 46 in the store: '{NORM}' differs\. Send both "
    await fails_and_heals(case, WeightsError, said, case.update("two"))


@pytest.mark.parametrize(("name", "how"), [("model.more.weight", "is unknown"), (NORM, "did not come")])
async def test_weights_that_the_store_does_not_have_or_that_do_not_come(case: Case, name: str, how: str) -> None:
    sender = trainer_of(case).sender
    assert sender is not None
    send = sender.send_weights

    def sends_others() -> None:
        assert isinstance(sender.source, dict)
        if how == "is unknown":
            sender.source[name] = sender.source[NORM]
        else:
            del sender.source[name]
        send()

    case.replace(sender, "send_weights", sends_others)
    said = rf"1 of the 4[57] weights from the trainer are not those of the 46 in the store: '{name}' {how}"
    await fails_and_heals(case, WeightsError, said, case.update("two"))


# -- engines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
async def test_engine_that_dies(case: Case, call: TransferCall) -> None:
    """At any call: the other engine takes the version. This one loads it from the store when it returns, also
    in the same process, as after a late answer. The next update works."""
    trainer_of(case).transports.disconnect()
    at_call(case, case.service.servers["b"], call, dies)
    for label in ("two", "three"):
        assert await case.update(label) == label
        await everyone_has(case, label)


@pytest.mark.parametrize("all_die", [False, True])
async def test_engine_that_dies_before_the_trainer_is_connected_to_it(case: Case, all_die: bool) -> None:
    """The trainer was told of it, and its collective would wait for it: the update fails at once."""
    error: type[TwinkleServeError] = EngineDeadError if all_die else EngineError
    said = "every engine died" if all_die else r"the trainer was to send to a .*, b .*; in use are a "
    for server in list(case.service.servers.values())[0 if all_die else 1 :]:
        case.replace(server, "pause", lambda mode: dies())
    await fails_and_heals(case, error, rf"{said}.* 'one' is current", case.update("two"))


@pytest.mark.parametrize("call", CALLS)
async def test_every_engine_dies(case: Case, call: TransferCall) -> None:
    trainer_of(case).transports.disconnect()
    for server in case.service.servers.values():
        at_call(case, server, call, dies)
    said = r"every engine died while it loaded 'two'.* 'one' is current"
    await fails_and_heals(case, EngineDeadError, said, case.update("two"))


@pytest.mark.parametrize("call", CALLS)
async def test_engine_that_refuses(case: Case, call: TransferCall) -> None:
    """The other one goes back."""

    async def refuses() -> None:
        raise WeightsError("not to my taste.")

    trainer_of(case).transports.disconnect()
    at_call(case, case.service.servers["b"], call, refuses)
    await fails_and_heals(case, WeightsError, r"b: not to my taste\. 'one' is current", case.update("two"))


@pytest.mark.parametrize("call", CALLS)
async def test_engine_that_hangs(case: Case, call: TransferCall) -> None:
    """Until the deadline. The trainer's thread, which waits for it, does not keep the update."""
    hanging = asyncio.Event()
    case.undo.append(hanging.set)
    trainer_of(case).transports.disconnect()
    at_call(case, case.service.servers["b"], call, hanging.wait)
    said = r"not loaded within 1 s for 'two'; 'one' is current"
    await fails_and_heals(case, DeadlineError, said, case.update("two", limit_s=1))


async def test_engine_that_waits_for_a_trainer_that_is_gone(case: Case) -> None:
    """In a collective, which nothing ends: its late weights do not reach the engine."""
    publishing = await begun(case, 2)
    router, upload = case.service.router, case.service.router._updates._update
    assert upload is not None
    info = {"names": [NORM], "shapes": [[128]]}
    waiting = asyncio.ensure_future(router.transfer_weights(upload.upload, "update", info))
    sides = [engine.receiver.side for engine in case.service.engines.values()]
    publishing.cancel()
    with pytest.raises(WeightsError, match=r"the trainer's call was cancelled\."):
        await waiting
    await everyone_has(case, "one")
    assert all(server._weights.version.label == "one" for server in case.service.servers.values())  # type: ignore[union-attr]
    sender = trainer_of(case).sender
    assert sender is not None
    for side in sides:
        assert side.active, "it has not finished"
    trainer_of(case).transports.disconnect()
    assert await case.update("two") == "two"
    await everyone_has(case, "two")


async def test_sender_that_hangs(case: Case) -> None:
    """Beyond the deadline: its late calls belong to its own update, which is over, and not to later ones."""
    sender, gone_on = trainer_of(case).sender, threading.Event()
    assert sender is not None
    sender.waits["middle"] = gone_on
    said = r"not loaded within 1 s for 'two'; 'one' is current"
    await fails_and_heals(case, DeadlineError, said, case.update("two", limit_s=1))
    receivers = [engine.receiver for engine in case.service.engines.values()]
    inits = [receiver.inits for receiver in receivers]
    gone_on.set()
    await asyncio.to_thread(sender.wire.cut.wait, 30)
    assert sender.wire.cut.is_set(), "its connection is closed once it goes on"
    await everyone_has(case, "three")
    assert await case.update("four") == "four"
    await everyone_has(case, "four")
    assert [receiver.inits for receiver in receivers] == inits, "the connection of the others is kept"


@pytest.mark.parametrize("outcome", ["fails", "connects"])
async def test_connection_that_comes_too_late(case: Case, outcome: str) -> None:
    """It is of an update that is over: the next one has its own, and keeps it."""
    case.monkeypatch.setattr(timing, "UPLOAD_LEASE_S", 0.3)
    trainer, go_on, went_on = trainer_of(case), threading.Event(), threading.Event()
    connect = trainer.transports._connect

    def connects_late(calls: WeightSyncClient, targets: tuple[TransferTarget, ...]) -> FakeSender:
        trainer.transports._connect = connect
        assert go_on.wait(60)
        try:
            if outcome == "fails":
                raise RuntimeError("the rendezvous took too long")
            return FakeSender({}, calls, targets)
        finally:
            went_on.set()

    trainer.transports.disconnect()
    trainer.transports._connect = connects_late
    await fails_and_heals(case, WeightsError, "sent the engines nothing for 0.3 s", case.update("two"))
    kept = trainer.transports._kept
    go_on.set()
    await asyncio.to_thread(went_on.wait, 30)
    assert await case.update("four") == "four"
    await everyone_has(case, "four")
    assert trainer.transports._kept is kept is not None


async def test_engines_that_are_others_than_the_trainer_was_told(case: Case) -> None:
    """One was replaced meanwhile: no engine waits for a trainer that does not know it."""
    server, router = case.service.servers["b"], case.service.router
    offer = router.offer_weights

    async def offers(*args: Any) -> TransferOffer:
        offered = await offer(*args)
        a, b = offered.targets
        return offered._replace(targets=(a, b._replace(incarnation="earlier")))

    case.replace(router, "offer_weights", offers)
    here = server._info.incarnation[:8]
    said = rf"the trainer was to send to a \(\w+\), b \(earlier\); in use are a \(\w+\), b \({here}\)"
    await fails_and_heals(case, EngineError, said, case.update("two"))


async def test_engine_that_loads_from_the_store_alone(case: Case) -> None:
    """The trainer is told before it sends anything."""
    engine = case.service.engines["b"]
    active = case.service.router._engines.active["b"]
    before = active.info
    active.info = replace(before, transfer_backend="")
    case.undo.append(lambda: setattr(active, "info", before))
    said = "b takes weights from the store alone, not by 'fake'"
    await fails_and_heals(case, UnsupportedError, said, case.update("two"))
    assert "two" not in engine.loads


async def test_delta_goes_to_the_store_alone(case: Case) -> None:
    trainer = trainer_of(case)
    uploads = WeightUploads(trainer.client, trainer.transports)
    with pytest.raises(UnsupportedError, match="delta=True sends to the store alone"):
        uploads.send(UpdateRequest("two", "keep", "", True, 20.0), lambda files: iter(PARTS), delta=True)


# -- order -----------------------------------------------------------------------------------------


async def test_calls_out_of_order(case: Case) -> None:
    """An engine takes weights between start and finish of one update, and a router's calls within it."""
    server = case.service.servers["a"]
    targets = (await case.service.router.offer_weights(KIND)).targets
    await server.pause("keep")
    with pytest.raises(WeightsError, match="the engine waits for no weights of this update: it has not begun"):
        await server.transfer_weights(TransferStep(7, "update", {"names": [], "shapes": []}, targets))
    with pytest.raises(WeightsError, match="'nonsense' is no call of a transfer"):
        await server.transfer_weights(TransferStep(7, "nonsense", {}, targets))  # type: ignore[arg-type]
    await server.resume()
    with pytest.raises(WeightsError, match="it has not begun"):
        await server.finish_transfer(7, await case.service.store.current_weights("main"), {})
    router = case.service.router
    with pytest.raises(StoreError, match="given up"):
        await router.transfer_weights(7, "start")
    upload = await router.begin_weights("two", "keep")
    with pytest.raises(WeightsError, match="did not begin as direct"):
        await router.transfer_weights(upload, "start")
    with pytest.raises(WeightsError, match="'two' did not begin as direct, and a plan is given"):
        await router.publish_weights(upload, "keep", 20, TransferPlan(targets, {}))
    await router.abandon_weights(upload)
    publishing = await begun(case, 0)
    begun_update = router._updates._update
    assert begun_update is not None
    with pytest.raises(WeightsError, match="'two' is being published already"):
        await router.publish_weights(begun_update.upload, "keep", 20, TransferPlan(targets, {}))
    await router.abandon_weights(begun_update.upload)
    with pytest.raises(WeightsError, match=r"the trainer gave the update up\. 'one' is current"):
        await publishing
    await everyone_has(case, "one")


@pytest.mark.parametrize("call", CALLS[:3])
async def test_late_calls_of_a_transfer_do_not_reach_the_engine(case: Case, call: TransferCall) -> None:
    """After the engine has gone back, or its process was replaced."""
    publishing = await begun(case, 2)
    upload = case.service.router._updates._update
    assert upload is not None
    publishing.cancel()
    await eventually(lambda: case.service.router._updates._update is None)
    await everyone_has(case, "one")
    server = case.service.servers["a"]
    targets = (await case.service.router.offer_weights(KIND)).targets
    with pytest.raises(WeightsError, match="the engine is not paused: the update is over"):
        await server.transfer_weights(TransferStep(upload.upload, call, {}, targets))
    earlier = tuple(target._replace(incarnation="earlier") for target in targets)
    await server.pause("keep")
    with pytest.raises(EngineDeadError, match="was restarted"):
        await server.transfer_weights(TransferStep(upload.upload, call, {}, earlier))
    await server.resume()
    assert server._weights.version is not None
    with pytest.raises(TwinkleServeError, match="given up"):
        await case.service.router.transfer_weights(upload.upload, "update", {})
    await everyone_has(case, "one")


@pytest.mark.parametrize("calls", range(4))
async def test_router_that_dies(case: Case, calls: int) -> None:
    """An engine without a whole version does not resume by itself: the next router makes it load the current one."""
    case.monkeypatch.setattr(timing, "ENGINE_PAUSE_LEASE_S", 0.2)
    service = case.service
    publishing = await begun(case, calls)
    service.router.close()
    publishing.cancel()
    if calls >= 2:  # after start
        await eventually(lambda: all(server._weights.version is None for server in service.servers.values()))
    service.router = successor(service)
    await service.router.start()
    await everyone_has(case, "one")
    case.trainer = Trainer(client_of(service.router), by_handles=trainer_of(case).by_handles)
    assert await case.update("two") == "two"
    await everyone_has(case, "two")


def successor(service: Service) -> Router:
    args = ServiceArgs.model_validate({"model_id": "demo", "engine": "fake", "device_mesh": {"dp_size": 2}})
    return Router(args, hub.DEMO, service.servers, service.store)
