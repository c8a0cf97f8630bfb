"""Ids of responses. One that is stored says where: nothing else needs to be kept for it."""

from __future__ import annotations

import base64
import binascii
import re
import uuid
from dataclasses import dataclass

from twinkle_serve.gateway.errors import NotFoundError

OWN_SESSION = "responses-"
"""Ids of sessions that the gateway makes for responses begin with it."""

_ID = re.compile(r"resp_([0-9a-f]{32})(?:_([A-Za-z0-9_-]+))?")


@dataclass(frozen=True, slots=True)
class ResponseId:
    """Identifies a response."""

    turn: str
    """Id of its turn."""
    sampler: str = ""
    session: str | None = None
    """Session that holds the turn; None for a response that is not stored."""

    @classmethod
    def new(cls, sampler: str, session: str | None) -> ResponseId:
        """Makes an id.

        Args:
            sampler: name of the sampler; it contains no @.
        """
        return cls(uuid.uuid4().hex, sampler, session)

    @classmethod
    def parse(cls, text: str) -> ResponseId:
        """Reads the id of a stored response. Raises NotFoundError."""
        match = _ID.fullmatch(text)
        place = "" if match is None or match[2] is None else _decoded(match[2])
        sampler, _, session = place.partition("@")
        if match is None or not session:
            raise NotFoundError(f"no response {text!r:.100} is stored. It is if the request has store: true.")
        return cls(match[1], sampler, session)

    def __str__(self) -> str:
        place = "" if self.session is None else f"_{_encoded(f'{self.sampler}@{self.session}')}"
        return f"resp_{self.turn}{place}"

    @property
    def has_own_session(self) -> bool:
        """Whether the gateway made the session."""
        return self.session is not None and self.session.startswith(OWN_SESSION)

    def item(self, prefix: str, index: int) -> str:
        """Returns the id of an item of the output."""
        return f"{prefix}_{self.turn}_{index}"


def new_session() -> str:
    """Returns the id of a session for responses alone."""
    return f"{OWN_SESSION}{uuid.uuid4().hex}"


def _encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decoded(text: str) -> str:
    """Returns the text, or an empty one for invalid characters."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
