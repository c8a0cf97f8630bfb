"""The sessions of a sampler behind a Serve handle."""

from __future__ import annotations

from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.handles import send
from deployments.store import Store
from deployments.store_client import until_answered
from twinkle_serve.channel import Address
from twinkle_serve.channel_calls import MethodClient
from twinkle_serve.sessions import Found, Query, SessionInfo, SessionRecord, SessionsAPI, Turn


class ServeSessionsClient(SessionsAPI):
    """Calls the sessions of a `Store` over a connection, again while it is being replaced: each is idempotent.

    A turn has two such calls: through a Serve handle, they would cost more than all else that a gateway does for it.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        """
        Args:
            handle: of the deployment `store`.
        """

        async def address() -> Address:
            return await send(handle, Store.address)

        self._client = MethodClient(address)

    async def find_turn(self, session: str, query: Query, hold_s: float = 0.0) -> Found:
        found: Found = await self._call("find_turn", session, query, hold_s)
        return found

    async def append_turn(self, session: str, turn: Turn) -> list[int]:
        nodes: list[int] = await self._call("append_turn", session, turn)
        return nodes

    async def end_session(self, session: str) -> bool:
        ended: bool = await self._call("end_session", session)
        return ended

    async def read_session(self, session: str) -> SessionRecord:
        record: SessionRecord = await self._call("read_session", session)
        return record

    async def list_sessions(self) -> list[SessionInfo]:
        infos: list[SessionInfo] = await self._call("list_sessions")
        return infos

    async def purge_sessions(self) -> None:
        await self._call("purge_sessions")

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await until_answered(lambda: self._client.call(method, *arguments))
