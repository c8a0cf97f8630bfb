"""Calls that their caller does not wait for, and their results, as they travel between client and router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import TwinkleServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A call to run without a waiting caller."""

    id: str
    """Its future's id. A second submission with the same id joins the first."""
    session: str
    """The call ends with the lease of its session."""
    group: str
    """Ends of calls are reported by group, see `RouterAPI.completions`."""
    request: SampleRequest | TwinkleServeError
    """The call, or the error as which its future fails: the caller learns of it where it collects the results."""
    note: bytes = b""
    """Returned with the result."""


FutureState: TypeAlias = Literal["pending", "done", "failed", "unknown"]


@dataclass(frozen=True, slots=True)
class FutureResult:
    """State of a future."""

    id: str
    state: FutureState
    """unknown: never submitted to this router, forgotten, or no longer kept."""
    response: SampleResponse | None = None
    """Only if done."""
    error: TwinkleServeError | None = None
    """Only if failed."""
    note: bytes = b""
    """The submission's."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A call that has ended."""

    id: str
    failed: bool
    size_bytes: int = 0
    """Approximate size of its response."""


@dataclass(frozen=True, slots=True)
class Completions:
    """Calls of a group that have ended."""

    completions: Sequence[Completion]
    cursor: int
    """Position to ask from the next time."""
