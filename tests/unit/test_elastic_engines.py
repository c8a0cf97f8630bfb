"""Engines in this process that come, go, are drained and are restarted, behind a router that goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import Any

import pytest

from tests.support.eventually import eventually
from twinkle_serve import TorchSampler, hub, timing
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.groups import Group
from twinkle_serve.engines.fake import FakeEngine
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import DeadlineError, EngineDeadError, RequestError, UnsupportedError
from twinkle_serve.routing.router import Router
from twinkle_serve.weights import LocalStore, WeightStore

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+1="}]} for a in range(10, 18)]
PARAMS = {"max_tokens": 4, "ignore_eos": True, "seed": 5}


class Engine(FakeEngine):
    """A fake engine that goes on when a test lets it."""

    def __init__(self, name: str) -> None:
        super().__init__(name, str(hub.DEMO), {"max_model_len": 128})
        self.go = asyncio.Event()
        self.go.set()
        self.groups = 0
        """That it has begun."""
        self.died = False

    async def check_health(self) -> None:
        if self.died:
            raise EngineDeadError("it died.")

    async def _steps(self, group: Group, samples: Sequence[Any]) -> AsyncGenerator[None, None]:
        self.groups += group.id >= 0  # not the one that warms it up
        async for _ in super()._steps(group, samples):
            await self.go.wait()
            yield


class Link:
    """An engine's server, and the one that takes its place when it is retired, as Serve would have it."""

    def __init__(self, name: str, store: LocalStore) -> None:
        self.name, self._store = name, store
        self.servers: list[EngineServer] = []
        self.returns = True

    async def start(self) -> None:
        self.engine = Engine(self.name)
        self.servers.append(EngineServer(self.engine, hub.DEMO, self._store))
        await self.servers[-1].start(self.name, 30)

    async def retire(self, incarnation: str, reason: str) -> None:
        await self.servers[-1].retire(incarnation, reason)
        if self.returns:
            await self.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.servers[-1], name)


class Service:
    """A router over engines a and b, in use."""

    def __init__(self) -> None:
        self.store = LocalStore(WeightStore("demo"))
        args = ServiceArgs.model_validate({"model_id": "demo", "engine": "fake", "device_mesh": {"dp_size": 2}})
        self.links = {name: Link(name, self.store) for name in ("a", "b")}
        self.router = Router(args, hub.DEMO, self.links, self.store)
        self.lost: list[str] = []

    async def start(self) -> None:
        for link in self.links.values():
            await link.start()
        await self.router.start()
        await eventually(lambda: self.states() == {"a": "ready", "b": "ready"})

    def states(self) -> dict[str, str]:
        return {name: engine["state"] for name, engine in self.router._engines.status().items()}

    async def add(self, name: str) -> None:
        """Starts an engine that the router does not know yet."""
        self.links[name] = Link(name, self.store)
        await self.links[name].start()

    async def set_engines(self, *names: str) -> None:
        for name in names:
            if name not in self.links:
                await self.add(name)
        self.router.set_engines({name: self.links[name] for name in names})

    async def sample(self, **options: Any) -> SampleResponse:
        return await self.router.sample(QUESTIONS, PARAMS, num_samples=2, **options)

    async def both_busy(self) -> asyncio.Task[SampleResponse]:
        """A call that both engines have begun, and that b does not finish."""
        self.links["b"].engine.go.clear()
        call = asyncio.create_task(self.sample())
        await eventually(lambda: all(link.engine.groups for link in self.links.values()))
        return call


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr(timing, "PROBE_PERIOD_S", 0.05)
    made = Service()
    await made.start()
    yield made
    assert not made.router._requests
    made.router.close()
    for link in made.links.values():
        for server in link.servers:
            await server.stop()


def engines(response: SampleResponse) -> set[str]:
    return {sequence.engine for sequence in response.sequences}


def tokens(response: SampleResponse) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


async def finished(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, 60)


async def test_engine_that_is_named_is_used(service: Service) -> None:
    """As soon as it answers, beside those that are there."""
    await service.set_engines("a", "b", "c")
    await eventually(lambda: service.states() == dict.fromkeys("abc", "ready"))
    assert engines(await service.sample()) == {"a", "b", "c"}
    assert service.router._engines.size == 3


async def test_engine_that_leaves_finishes_what_it_has(service: Service) -> None:
    """It gets nothing new meanwhile, and is forgotten when it is done."""
    call = await service.both_busy()
    await service.set_engines("a")
    assert service.states()["b"] == "draining" and service.router._engines.size == 1
    assert engines(await service.sample()) == {"a"}
    service.links["b"].engine.go.set()
    assert engines(await finished(call)) == {"a", "b"}
    await eventually(lambda: service.states() == {"a": "ready"})


async def test_engine_that_leaves_too_slowly_loses_its_groups_to_others(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples are those that its seeds give, twice in turn is no failure, and it is told to abort them."""
    monkeypatch.setattr(timing, "REMOVED_ENGINE_GRACE_S", 0.05)
    expected = tokens(await service.sample())
    call = await service.both_busy()
    await service.add("c")
    service.links["c"].engine.go.clear()
    await service.set_engines("c")
    await eventually(lambda: "b" not in service.states() and service.links["c"].engine.groups > 0)
    await service.set_engines("a")  # what b had loses c as well
    response = await finished(call)
    assert tokens(response) == expected
    assert engines(response) == {"a"}
    await eventually(lambda: not service.links["b"].engine._sampling and not service.links["c"].engine._sampling)
    assert not [task for task in asyncio.all_tasks() if "_follow_engine" in repr(task) and task.cancelling()]


async def test_engine_that_is_named_again_while_it_leaves_is_used(service: Service) -> None:
    """Under its name, whatever process answers to it."""
    call = await service.both_busy()
    await service.set_engines("a")
    service.links["b"] = Link("b", service.store)
    await service.links["b"].start()
    await service.set_engines("a", "b")
    assert await finished(call)
    await eventually(lambda: service.states() == {"a": "ready", "b": "ready"})
    assert engines(await service.sample()) == {"a", "b"}


async def test_drained_engine_stays_out_until_undrained(service: Service) -> None:
    """The call returns when it has finished; it catches up with what it missed."""
    call = await service.both_busy()
    drain = asyncio.create_task(service.router.drain_engine("b", 30))
    await eventually(lambda: service.states()["b"] == "draining")
    assert not drain.done()
    service.links["b"].engine.go.set()
    await finished(drain)
    assert engines(await call) == {"a", "b"}
    assert service.states() == {"a": "ready", "b": "drained"}
    assert engines(await service.sample()) == {"a"}
    await service.router.undrain_engine("b")
    await eventually(lambda: service.states()["b"] == "ready")
    assert engines(await service.sample()) == {"a", "b"}


async def test_drain_moves_what_is_left_at_its_timeout(service: Service) -> None:
    """To the other engine, with its seeds."""
    expected = tokens(await service.sample())
    call = await service.both_busy()
    await finished(service.router.drain_engine("b", 0.05))
    response = await finished(call)
    assert engines(response) == {"a"} and tokens(response) == expected


async def test_undrain_ends_a_drain_that_waits(service: Service) -> None:
    """What the engine has goes on there, and it gets more at once."""
    call = await service.both_busy()
    drain = asyncio.create_task(service.router.drain_engine("b", 0.5))
    await eventually(lambda: service.states()["b"] == "draining")
    await service.router.undrain_engine("b")
    assert service.states()["b"] == "ready"
    await finished(drain)
    assert service.states()["b"] == "ready"
    service.links["b"].engine.go.set()
    assert engines(await finished(call)) == {"a", "b"}


async def test_calls_wait_while_every_engine_is_drained(service: Service) -> None:
    """Within their deadlines; streams too."""
    for name in service.links:
        await service.router.drain_engine(name, 1)
    with pytest.raises(DeadlineError, match="0 of 2 engines are up"):
        await service.sample(timeout_s=0.1)
    call = asyncio.create_task(service.sample())

    async def text() -> str:
        parts = service.router.sample_stream(QUESTIONS[0], PARAMS)
        return "".join([part async for part, _ in parts])

    stream = asyncio.create_task(text())
    await eventually(lambda: service.router._scheduler.waiting > 0)
    await service.router.undrain_engine("b")
    assert engines(await finished(call)) == {"b"}
    assert await finished(stream)


async def test_restart_returns_when_the_new_process_is_used(service: Service) -> None:
    """Nothing is lost; a bystander finishes on the other engine."""
    call = await service.both_busy()
    old = service.links["b"].servers[-1]
    restart = asyncio.create_task(service.router.restart_engine("b", 0.05, 30))
    assert engines(await finished(service.sample())) == {"a"}
    await finished(restart)
    assert await finished(call)
    assert service.states() == {"a": "ready", "b": "ready"}
    with pytest.raises(EngineDeadError, match="restart_engine was called"):
        await old.check_health()
    assert engines(await service.sample()) == {"a", "b"}


async def test_restart_of_an_engine_that_has_died_waits_for_its_next_process(service: Service) -> None:
    """The router has not noticed yet."""
    old = service.links["b"].engine
    old.died = True
    await service.router.restart_engine("b", 1, 30)
    assert service.links["b"].engine is not old
    assert service.states() == {"a": "ready", "b": "ready"}
    assert engines(await service.sample()) == {"a", "b"}


async def test_restart_spares_the_process_that_has_come_meanwhile(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one has ended by itself when it is to be told to go."""
    link = service.links["b"]

    async def late(incarnation: str, reason: str) -> None:
        await link.start()
        await link.servers[-1].retire(incarnation, reason)

    monkeypatch.setattr(link, "retire", late)
    await service.router.restart_engine("b", 1, 30)
    assert len(link.servers) == 2
    await link.servers[-1].check_health()


async def test_restart_ends_at_its_deadline(service: Service) -> None:
    """The engine is used when it can be all the same."""
    service.links["b"].returns = False
    with pytest.raises(DeadlineError, match=r"b was not in use again within 0\.2 s"):
        await service.router.restart_engine("b", 0.1, 0.2)
    assert engines(await service.sample()) == {"a"}
    await service.links["b"].start()
    await eventually(lambda: service.states()["b"] == "ready")


async def test_unknown_engine_is_refused(service: Service) -> None:
    """By all three, with the name that was meant."""
    calls = [
        service.router.drain_engine("bb", 1),
        service.router.undrain_engine("bb"),
        service.router.restart_engine("bb", 1, 1),
    ]
    for call in calls:
        with pytest.raises(RequestError, match="unknown engine 'bb', did you mean 'b'"):
            await call


async def test_drained_engine_has_the_weights_that_came_meanwhile(service: Service) -> None:
    """It is brought up to date before it is used again."""
    from twinkle_serve.checkpoint import named_tensors
    from twinkle_serve.packing import buckets

    await service.router.drain_engine("b", 1)
    upload = await service.router.begin_weights("one", "keep")
    for index, part in enumerate(buckets(named_tensors(hub.DEMO), 2**20)):
        await service.router.append_weights(upload, index, part)
    await service.router.publish_weights(upload, "keep", 30)
    await service.router.undrain_engine("b")
    await eventually(lambda: service.states()["b"] == "ready")
    response = await service.sample()
    spans = {(s.engine, span.version) for s in response.sequences for span in s.weight_versions}
    assert spans == {("a", "one"), ("b", "one")}


def test_sampler_in_this_process_refuses() -> None:
    """Its only engine goes with it."""
    sampler = TorchSampler("demo")
    try:
        for call in (sampler.drain_engine, sampler.undrain_engine, sampler.restart_engine):
            with pytest.raises(UnsupportedError, match="the only engine is in this process"):
                call("engine-dp0")
    finally:
        sampler.shutdown()
