"""The interface of the store of sessions as gateways and routers see it."""

from __future__ import annotations

from typing import Protocol

from twinkle_serve.sessions.records import Found, Query, SessionInfo, SessionRecord, Turn


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
