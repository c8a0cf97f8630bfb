"""An engine behind a Serve handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence

from ray.serve.handle import DeploymentHandle

from deployments.handles import call, engine_errors, iterate
from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group, Session, TextDelta
from twinkle_serve.data_format.weights import ModelSpec, PauseMode, WeightsVersion
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.engines.group_runner import Finished
from twinkle_serve.engines.server import EngineServer


class ServeEngineClient(EngineClient):
    """Calls an `EngineServer` through a Serve handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def describe(self, router: str) -> EngineInfo:
        return await call(self._handle, EngineServer.describe, router)

    async def submit(self, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        # A broadcast skips the queue-length probe that Serve makes before a call, two fifths of its cost; and without
        # a living replica it fails at once.
        try:
            with engine_errors():
                responses = self._handle.broadcast(EngineServer.submit.__name__, session, groups, more)
                answers = await responses.results_async(return_exceptions=True)
                if all(isinstance(answer, BaseException) for answer in answers):
                    raise answers[0]
                # While one replica replaces another there are two answers; the session belongs to one of them.
        except asyncio.CancelledError:  # a broadcast cannot be cancelled
            self._handle.abort.remote(session, [group.attempt for group in groups])
            raise

    def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        return iterate(self._streams, EngineServer.results, session)

    def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        return iterate(self._streams, EngineServer.stream, session, group)

    async def abort(self, session: Session, attempts: Iterable[Attempt]) -> None:
        await call(self._handle, EngineServer.abort, session, list(attempts))

    async def load_adapter(self, version: AdapterVersion) -> None:
        await call(self._handle, EngineServer.load_adapter, version)

    async def drop_adapter(self, version: AdapterVersion) -> None:
        await call(self._handle, EngineServer.drop_adapter, version)

    async def keep_adapters(self, ids: Sequence[int]) -> None:
        await call(self._handle, EngineServer.keep_adapters, ids)

    async def model_spec(self) -> ModelSpec:
        return await call(self._handle, EngineServer.model_spec)

    async def load_weights(self, version: WeightsVersion) -> str:
        return await call(self._handle, EngineServer.load_weights, version)

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
