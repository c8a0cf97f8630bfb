"""A router over two engines in this process, whose weights are updated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from dataclasses import replace
from typing import Any

from tests.support.eventually import eventually
from tests.support.transfers import KIND, FakeReceiver
from twinkle_serve import hub
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.groups import Group
from twinkle_serve.engines.fake import FakeEngine
from twinkle_serve.engines.protocol import StagedBucket
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.engines.stages import OnStage, ignore_stage
from twinkle_serve.errors import WeightsError
from twinkle_serve.packing import buckets
from twinkle_serve.routing.router import Router
from twinkle_serve.weights import LocalStore, WeightStore

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+1="}]} for a in range(10, 26)]
PARTS = list(buckets(named_tensors(hub.DEMO), 2**20))


class Engine(FakeEngine):
    """A fake engine that does to weights of some label what a test wants."""

    def __init__(self, name: str) -> None:
        super().__init__(name, str(hub.DEMO), {"max_model_len": 128})
        self.refuses: set[str] = set()
        self.hangs: set[str] = set()
        self.let_go = asyncio.Event()
        """Ends what hangs."""
        self.garbles: set[str] = set()
        self.delays: dict[str, float] = {}
        """Seconds that a load takes."""
        self.loads: list[str] = []
        self.steps = 0
        self.receiver: FakeReceiver = FakeReceiver(self)

    async def start(self, on_stage: OnStage = ignore_stage) -> None:
        await super().start(on_stage)
        self.info = replace(self.info, transfer_backend=KIND)

    async def _steps(self, group: Group, samples: Sequence[Any]) -> AsyncGenerator[None, None]:
        async for _ in super()._steps(group, samples):
            self.steps += 1
            yield

    async def load_weights(self, label: str, buckets: AsyncIterable[StagedBucket]) -> str:
        self.loads.append(label)
        if label in self.refuses:
            raise WeightsError(f"{label} is not to my taste.")
        if label in self.hangs:
            await self.let_go.wait()
        await asyncio.sleep(self.delays.get(label, 0.0))
        checksum = await super().load_weights(label, buckets)
        return "other" if label in self.garbles else checksum


class Service:
    """A router over two engines."""

    def __init__(self) -> None:
        self.engines = {name: Engine(name) for name in ("a", "b")}
        self.store = LocalStore(WeightStore("demo"))
        self.servers = {name: EngineServer(engine, hub.DEMO, self.store) for name, engine in self.engines.items()}
        args = ServiceArgs.model_validate({"model_id": "demo", "engine": "fake", "device_mesh": {"dp_size": 2}})
        self.router = Router(args, hub.DEMO, self.servers, self.store)

    async def start(self) -> None:
        for name, server in self.servers.items():
            await server.start(name, 30)
        await self.router.start()
        await self.ready()

    async def ready(self) -> None:
        await self.ready_with(None)

    async def ready_with(self, label: str | None) -> None:
        """Until all engines are in use; with weights of this label, if one is given."""

        async def all_ready() -> bool:
            status = await self.router.status()
            ready = all(engine["state"] == "ready" for engine in status["engines"].values())
            return ready and label in (None, status["weights"])

        await eventually(all_ready)

    async def update(self, label: str, timeout_s: float = 30.0, durable: bool = True) -> str:
        upload = await self.router.begin_weights(label, "keep", durable)
        for index, part in enumerate(PARTS):
            await self.router.append_weights(upload, index, part)
        return await self.router.publish_weights(upload, "keep", timeout_s)

    async def labels_within(self, timeout_s: float) -> set[tuple[str, str]]:
        """`labels`; none if no engine samples in this time."""
        try:
            return await asyncio.wait_for(self.labels(), timeout_s)
        except TimeoutError:
            return set()

    async def labels(self) -> set[tuple[str, str]]:
        """Engine and version of each of some samples."""
        response = await self.router.sample(QUESTIONS, {"max_tokens": 2}, num_samples=2)
        return {(s.engine, span.version) for s in response.sequences for span in s.weight_versions}

    async def stop(self) -> None:
        self.router.close()
        for server in self.servers.values():
            await server.stop()
