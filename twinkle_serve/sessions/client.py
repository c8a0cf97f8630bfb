"""The interface of the store of sessions as gateways and routers see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

from twinkle_serve.sessions.records import Found, Query, SessionInfo, SessionRecord, Turn
from twinkle_serve.sessions.store import SessionStore

P = ParamSpec("P")
T = TypeVar("T")

SWEEP_S = 1.0
"""Expired sessions are removed at most this often."""


class SessionsAPI(Protocol):
    """The sessions of a sampler, in this process (`LocalSessions`) or behind a handle.

    Every call raises SessionError for an invalid id and StoreError where the store is gone or cannot write.
    """

    async def find_turn(self, session: str, query: Query, hold_s: float = 0.0) -> Found:
        """Returns the longest part of a conversation that a session has; nothing in a session that does not exist yet.

        Args:
            query: of `Conversation.query`.
            hold_s: how long the turn may take: the session does not expire before, seconds.

        Raises:
            SessionGoneError: the session has ended.
        """
        ...

    async def append_turn(self, session: str, turn: Turn) -> list[int]:
        """Adds a turn, and makes the session if it is its first. Returns the numbers of its nodes, one a sample.

        Guarantees:
            When it has returned, the turn survives the death of this process.
            Idempotent by the turn's id.

        Raises:
            SessionGoneError: the session has ended since the turn began.
            SessionError: there is no such node before it, or it is larger than all sessions may be together.
            ServiceError: its prompt does not begin with the tokens of the node before it.
        """
        ...

    async def end_session(self, session: str) -> bool:
        """Ends a session for good, and deletes its turns. Returns whether there was one. Idempotent."""
        ...

    async def read_session(self, session: str) -> SessionRecord:
        """Returns a session with all its turns; see `trajectory` and `features`.

        Raises:
            SessionGoneError: it has ended.
            SessionNotFoundError: it has no turn yet.
        """
        ...

    async def list_sessions(self) -> list[SessionInfo]:
        """Returns the sessions, the least recently used one first."""
        ...

    async def purge_sessions(self) -> None:
        """Deletes all sessions, and forgets those that have ended."""


class LocalSessions(SessionsAPI):
    """Sessions in this process. Its calls run in one thread, since a `SessionStore` is not thread-safe."""

    def __init__(self, sessions: SessionStore) -> None:
        self._sessions = sessions
        self._session_thread = ThreadPoolExecutor(1, thread_name_prefix="sessions")
        self._sweep: asyncio.TimerHandle | None = None
        """Removes expired sessions while nothing calls."""

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._session_thread, partial(call, *args, **options))
        if self._sweep is None:
            self._plan_sweep(loop, await loop.run_in_executor(self._session_thread, self._sessions.expire))
        return answer

    def _plan_sweep(self, loop: asyncio.AbstractEventLoop, left_s: float | None) -> None:
        if self._sweep is None and left_s is not None:
            self._sweep = loop.call_later(max(left_s, SWEEP_S), self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweep = None
        future = loop.run_in_executor(self._session_thread, self._sessions.expire)
        future.add_done_callback(lambda done: None if done.cancelled() else self._plan_sweep(loop, done.result()))

    async def find_turn(self, session: str, query: Query, hold_s: float = 0.0) -> Found:
        return await self._in_thread(self._sessions.find, session, query, hold_s)

    async def append_turn(self, session: str, turn: Turn) -> list[int]:
        return await self._in_thread(self._sessions.append, session, turn)

    async def end_session(self, session: str) -> bool:
        return await self._in_thread(self._sessions.end, session)

    async def read_session(self, session: str) -> SessionRecord:
        return await self._in_thread(self._sessions.read, session)

    async def list_sessions(self) -> list[SessionInfo]:
        return await self._in_thread(self._sessions.infos)

    async def count_sessions(self) -> int:
        """Returns the number of sessions."""
        return await self._in_thread(self._sessions.__len__)

    async def purge_sessions(self) -> None:
        await self._in_thread(self._sessions.purge)
