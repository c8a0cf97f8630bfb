"""Sessions: the turns of conversations, token by token."""

from twinkle_serve.sessions.client import SessionsAPI
from twinkle_serve.sessions.records import Found, Query, SessionInfo, SessionRecord, Turn
from twinkle_serve.sessions.turn import Conversation, SessionTurn

__all__ = ["Conversation", "Found", "Query", "SessionInfo", "SessionRecord", "SessionTurn", "SessionsAPI", "Turn"]
