"""An engine behind a Serve handle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from functools import partial

from ray.actor import ActorHandle
from ray.serve.handle import DeploymentHandle

from deployments.engine import Engine
from deployments.handles import call, engine_errors, iterate
from twinkle_serve.channel_calls import MethodClient
from twinkle_serve.data_format.adapters import AdapterArgument, AdapterVersion
from twinkle_serve.data_format.groups import Attempt, Chunk, EngineInfo, Group, Session, TextDelta
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.data_format.weights import ModelSpec, PauseMode, TransferStep, WeightsVersion
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.engines.group_runner import Finished
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.remote.inbox import Address


class ServeEngineClient(EngineClient):
    """Calls an `EngineServer` through a Serve handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)
        self._actor: ActorHandle[object] | None = None
        """The process that answered last, until it ends."""
        self._opening = asyncio.Lock()
        self._connection = MethodClient(partial(call, handle, Engine.control_address))
        self._session: Session | None = None
        """The session that chunks were last sent in."""
        self._address: Address[Chunk] | None = None

    async def describe(self, router: str) -> EngineInfo:
        # Serve keeps a call to a dead process until the process is replaced, which takes as long as a start.
        if (actor := self._actor) is not None:
            self._actor = None
            with engine_errors():
                await actor.__ray_ready__.remote()
        info = await call(self._handle, EngineServer.describe, router)
        self._actor = actor or await call(self._handle, Engine.actor)
        return info

    async def submit(self, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        async with self._opening:
            if session != self._session:
                self._address = await call(self._handle, Engine.address, session)
                self._session = session
        assert self._address is not None
        # No answer: `results` raises if the process is gone, or if a chunk was lost.
        with engine_errors():
            self._address.post(Chunk(session, groups, more))

    def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        return iterate(self._streams, EngineServer.results, session)

    def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        return iterate(self._streams, EngineServer.stream, session, group)

    async def abort(self, session: Session, attempts: Iterable[Attempt]) -> None:
        await call(self._handle, EngineServer.abort, session, list(attempts))

    async def check_structured(self, structured: StructuredOutputs) -> None:
        await call(self._handle, EngineServer.check_structured, structured)

    async def load_adapter(self, version: AdapterVersion, files: AdapterArgument | None = None) -> None:
        if not isinstance(files, list):  # Ray counts references in its own calls alone
            with contextlib.suppress(ConnectionError):  # a call through the handle says why
                await self._connection.call("load_adapter", version, files)
                return
        await call(self._handle, EngineServer.load_adapter, version, files)

    async def drop_adapter(self, version: AdapterVersion) -> None:
        await call(self._handle, EngineServer.drop_adapter, version)

    async def keep_adapters(self, ids: Sequence[int]) -> None:
        await call(self._handle, EngineServer.keep_adapters, ids)

    async def model_spec(self) -> ModelSpec:
        return await call(self._handle, EngineServer.model_spec)

    async def prepare_weights(self, version: WeightsVersion) -> None:
        await call(self._handle, EngineServer.prepare_weights, version)

    async def load_weights(self, version: WeightsVersion) -> str:
        return await call(self._handle, EngineServer.load_weights, version)

    async def transfer_weights(self, step: TransferStep) -> None:
        await call(self._handle, EngineServer.transfer_weights, step)

    async def finish_transfer(self, upload: int, version: WeightsVersion, digests: Mapping[str, str]) -> str:
        return await call(self._handle, EngineServer.finish_transfer, upload, version, digests)

    async def pause(self, mode: PauseMode) -> None:
        await call(self._handle, EngineServer.pause, mode)

    async def resume(self) -> None:
        await call(self._handle, EngineServer.resume)

    async def reset_prefix_cache(self) -> None:
        await call(self._handle, EngineServer.reset_prefix_cache)

    async def sleep(self, level: int) -> None:
        await call(self._handle, EngineServer.sleep, level)

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        await call(self._handle, EngineServer.wake_up, tags)

    async def retire(self, incarnation: str, reason: str) -> None:
        await call(self._handle, EngineServer.retire, incarnation, reason)
