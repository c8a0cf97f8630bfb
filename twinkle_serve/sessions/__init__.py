"""Sessions: conversations by their tokens, as a tree of turns."""

from twinkle_serve.sessions.client import LocalSessions, SessionsAPI
from twinkle_serve.sessions.records import Found, Query, SessionInfo, SessionRecord, Turn
from twinkle_serve.sessions.store import SessionStore
from twinkle_serve.sessions.trajectory import features, trajectory
from twinkle_serve.sessions.turn import Conversation, SessionTurn

__all__ = [
    "Conversation",
    "Found",
    "LocalSessions",
    "Query",
    "SessionInfo",
    "SessionRecord",
    "SessionStore",
    "SessionTurn",
    "SessionsAPI",
    "Turn",
    "features",
    "trajectory",
]
