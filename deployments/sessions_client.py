"""The sessions of a sampler behind a Serve handle."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Concatenate, ParamSpec, TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.handles import send
from deployments.store_client import until_answered
from twinkle_serve.sessions import Found, Query, SessionInfo, SessionRecord, SessionsAPI, Turn

P = ParamSpec("P")
T = TypeVar("T")


class ServeSessionsClient(SessionsAPI):
    """Calls the sessions of a `Store` through a Serve handle, again while it is being replaced: each is idempotent."""

    def __init__(self, handle: DeploymentHandle) -> None:
        """
        Args:
            handle: of the deployment `store`.
        """
        self._handle = handle

    async def find_turn(self, session: str, query: Query, hold_s: float = 0.0) -> Found:
        return await self._call(SessionsAPI.find_turn, session, query, hold_s)

    async def append_turn(self, session: str, turn: Turn) -> list[int]:
        return await self._call(SessionsAPI.append_turn, session, turn)

    async def end_session(self, session: str) -> bool:
        return await self._call(SessionsAPI.end_session, session)

    async def read_session(self, session: str) -> SessionRecord:
        return await self._call(SessionsAPI.read_session, session)

    async def list_sessions(self) -> list[SessionInfo]:
        return await self._call(SessionsAPI.list_sessions)

    async def purge_sessions(self) -> None:
        await self._call(SessionsAPI.purge_sessions)

    async def _call(
        self, method: Callable[Concatenate[SessionsAPI, P], Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> T:
        return await until_answered(lambda: send(self._handle, method, *args, **options))
