"""Ids of sessions and futures. They describe themselves, so that any gateway process can serve any request."""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass

from twinkle_serve.gateway.errors import NotFoundError

CLONE_STEP = 1_000_000_000
"""Copies of a client number their requests from multiples of it."""

MAX_ID_LENGTH = 4096


def new_session() -> str:
    """Makes the id of a session, which nobody guesses."""
    return f"session-{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True)
class SamplingSession:
    """A sampler and an adapter version, for one session."""

    sampler: str
    """Name under which clients see it."""
    adapter: str
    """`name@version`, or "" for the model's own weights."""
    session: str
    number: int
    """Among the sampling sessions of its session."""

    @property
    def id(self) -> str:
        """The id that clients use: they put it into paths unquoted."""
        packed = json.dumps([self.sampler, self.adapter, self.session, self.number], separators=(",", ":"))
        return base64.urlsafe_b64encode(packed.encode()).decode().rstrip("=")

    @property
    def model_path(self) -> str:
        """The path of its version."""
        return f"tinker://{self.sampler}/{self.adapter}"

    @classmethod
    def of(cls, sampling_session_id: str) -> SamplingSession:
        """Reads an id. Raises NotFoundError if this gateway did not make it."""
        try:
            padded = sampling_session_id + "=" * (-len(sampling_session_id) % 4)
            sampler, adapter, session, number = json.loads(base64.b64decode(padded, b"-_", validate=True))
            made = cls(sampler, adapter, session, number)
            if made.id == sampling_session_id and [type(each) for each in (sampler, adapter, session)] == [str] * 3:
                return made
        except (ValueError, TypeError, RecursionError):
            pass
        raise NotFoundError(f"unknown sampling session {sampling_session_id[:80]!r}. Make a new sampling client.")

    def request_id(self, seq_id: int) -> str:
        """Returns the id of a request's future: the same for each repetition of the request."""
        return f"{self.id}.{seq_id}"

    def group(self, clone: int) -> str:
        """Returns the name under which ends of requests of one client are reported."""
        return f"{self.id}.{clone}"


@dataclass(frozen=True, slots=True)
class RequestId:
    """The id of a future, taken apart."""

    sampling_session: SamplingSession
    seq_id: int

    @classmethod
    def of(cls, request_id: str) -> RequestId:
        """Reads an id. Raises NotFoundError if this gateway did not make it."""
        session_id, _, seq_id = request_id.rpartition(".")
        if len(request_id) > MAX_ID_LENGTH or not (seq_id.isascii() and seq_id.isdecimal() and len(seq_id) < 20):
            raise NotFoundError(f"unknown request {request_id[:80]!r}.")
        return cls(SamplingSession.of(session_id), int(seq_id))

    @property
    def group(self) -> str:
        """See `SamplingSession.group`."""
        return self.sampling_session.group(self.seq_id // CLONE_STEP)
