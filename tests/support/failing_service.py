"""A router over two engines in this process that a test can end or hang; they come back, as under Serve."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.support.eventually import eventually
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.engines.fake import FakeEngine
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import EngineCrashedError, EngineDeadError
from twinkle_serve.routing.router import Router
from twinkle_serve.weights import LocalStore, WeightStore

POISON = 65
"""First token of a prompt that ends its engine."""
PROMPTS = [{"input_ids": [i, 20, 21]} for i in range(24, 56)]


class Engine(FakeEngine):
    """A fake engine that can be ended, or hang."""

    def __init__(self, name: str) -> None:
        super().__init__(name, str(hub.DEMO), {"max_model_len": 128, "max_num_seqs": 8})
        self.error: EngineDeadError | None = None
        self.hangs = False
        self.gate: asyncio.Event | None = None
        """Samples after the first of a group wait for it."""
        self.dead = asyncio.Event()
        self.sampled: Counter[tuple[int, int]] = Counter()
        """Samples that were begun, by prompt and index."""
        self.fuses: list[float] = []
        """Seconds that the poison takes, each time."""

    def end(self, error: EngineDeadError) -> None:
        self.error = error
        self.dead.set()

    async def sample_group(self, group: Group) -> SampleColumns:
        fuse = None
        if group.id >= 0 and group.prompt_ids[0] == POISON:
            fuse_s = self.fuses.pop(0) if self.fuses else 0.0
            fuse = asyncio.get_running_loop().call_later(fuse_s, self.end, EngineCrashedError(f"{self._name} crashed."))
        if group.id >= 0:
            self.sampled[int(group.prompt_ids[0]), group.first_sample] += 1
        dead = asyncio.ensure_future(self.dead.wait())
        sampling = asyncio.ensure_future(self._sample(group))
        try:
            await asyncio.wait({dead, sampling}, return_when=asyncio.FIRST_COMPLETED)
            if self.error is not None:
                raise self.error
            return sampling.result()
        finally:
            dead.cancel()
            sampling.cancel()
            if fuse is not None:  # or it would end an engine that the prompt has left
                fuse.cancel()

    async def _sample(self, group: Group) -> SampleColumns:
        if group.id >= 0 and self.gate is not None and group.first_sample:
            await self.gate.wait()
        if group.id >= 0 and self.hangs:
            await asyncio.Event().wait()
        return await super().sample_group(group)

    async def check_health(self) -> None:
        if self.error is not None:
            raise self.error


class Service:
    """A router over engines that come back when they end, as Serve has them."""

    def __init__(self, names: Sequence[str] = ("a", "b"), **args: Any) -> None:
        """
        Args:
            names: of the engines.
            args: of the config.
        """
        self.engines = {name: Engine(name) for name in names}
        self.store = LocalStore(WeightStore("demo"))
        self.args = ServiceArgs.model_validate({"model_id": "demo", "engine": "fake", **args})
        tracks = self.args.tracks_of(names)
        self.servers = {
            name: EngineServer(engine, hub.DEMO, self.store, track=tracks[name])
            for name, engine in self.engines.items()
        }
        self.router = Router(self.args, hub.DEMO, self.servers, self.store)
        self.restarts = 0
        self.kept_down: set[str] = set()
        """Engines that do not come back for now."""

    async def start(self) -> None:
        for name, server in self.servers.items():
            await server.start(name, 30)
        await self.router.start()
        self._keeper = asyncio.create_task(self._keep())

        async def all_ready() -> bool:
            engines = (await self.router.status())["engines"].values()
            return all(engine["state"] == "ready" for engine in engines)

        await eventually(all_ready)

    async def _keep(self) -> None:
        """Replaces engines that end, or that are retired."""
        while True:
            for name, server in self.servers.items():
                engine = self.engines[name]
                if name in self.kept_down:
                    continue
                if server._retired or (engine.error is not None and self.router._engines.states[name] == "dead"):
                    self.restarts += 1
                    # Until it has a new incarnation, nobody may take it for the old one, back again.
                    server._retired = "it is being replaced"
                    while server._routers:  # a new process has none
                        server._routers.popitem()[1].close()
                    engine.error, engine.hangs, engine.dead = None, False, asyncio.Event()
                    await server.start(name, 30)
                    server._retired = ""
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._keeper.cancel()
        self.router.close()
        for server in self.servers.values():
            await server.stop()

    async def idle(self) -> bool:
        status = await self.router.status()
        sequences = sum(engine["sequences"] for engine in status["engines"].values())
        return not (sequences or status["groups_waiting"] or status["requests"] or self.running())

    def running(self) -> int:
        """Groups that run in the engines."""
        return sum(lease.runner.running for server in self.servers.values() for lease in server._routers.values())


def exact(response: Any, prompts: int, samples: int) -> bool:
    return [seq.prompt_index for seq in response.sequences] == [i for i in range(prompts) for _ in range(samples)]
