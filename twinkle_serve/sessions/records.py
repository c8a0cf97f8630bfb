"""Turns of sessions, as they are sent and kept: messages as JSON, numbers as arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.samples import FloatArray, StopReason
from twinkle_serve.data_format.weights import Spans
from twinkle_serve.sessions.canonical import MessageKey

Branch: TypeAlias = Literal["", "retry", "fork", "edited", "empty", "root", "tools"]
"""Why a turn is no plain continuation.

"": it is one, or the session's first turn. retry: the same prompt was sampled before. fork: the node before it has
another turn. edited: the client changed a sampled message, so that the turn follows the last node before. empty: a
sampled message has no tokens that others could follow. root: the first messages, or the text, are of no earlier turn.
tools: the messages have other tools than the turns before."""

NO_IDS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of a turn."""

    tokens: NDArray[np.int32]
    """Sampled token ids. Shape [T]."""
    logprobs: FloatArray | None
    """Log p of each of them, nats. Shape [T]; None if not requested."""
    weight_versions: Spans
    adapter: str
    """`name@version` of the adapter; "" for the base model."""
    seed: int | None
    stop_reason: StopReason
    engine: str
    reply: bytes = b""
    """JSON of the assistant's message as the template's parser makes it; empty for a sample without tokens, and of raw
    prompts."""
    shown: bytes = b""
    """JSON of the message that the client was given, where it differs from `reply`."""
    checksum: int = 0
    """`messages.checksum` of `reply`."""
    keys: bytes = b""
    """Packed keys of `reply` and of `shown`, without repetition."""
    text: str | None = None
    """Text of all tokens of a raw prompt's sample, special tokens included; None if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A prompt and its samples. Each sample is a node of the session's tree.

    Nodes are numbered in the order in which they were added, so a turn has consecutive ones.
    """

    id: str
    """Chosen by the caller: a turn that is appended twice is kept once."""
    root: bytes
    """See `root_key`."""
    raw: bool = False
    """Whether the prompt was given by text or ids instead of messages."""
    parent: int | None = None
    """The node that it follows; None for the first messages of a conversation."""
    branch: Branch = ""
    messages: bytes = b"[]"
    """JSON of the list of messages after those of the parent. Of the conversation's beginning without a parent."""
    keys: bytes = b""
    """Packed keys of these messages."""
    checksums: tuple[int, ...] = ()
    """`messages.checksum` of each of them."""
    tools: bytes = b""
    """JSON of the tools, of a turn without parent; empty for none."""
    replaces: bool = False
    """Whether the samples' messages replace the last message before them, which they continue."""
    assistant_start: int = 0
    """Index in the ids of the first token that was sampled for the message."""
    written: str | None = None
    """Text of the message before its sampled tokens, if the client wrote it."""
    prompt: NDArray[np.int32] = field(default_factory=lambda: NO_IDS)
    """Token ids of the prompt after those of the parent. Shape [P]."""
    prompt_length: int = 0
    """Number of tokens of the whole prompt."""
    prompt_checksum: int = 0
    """`ids_checksum` of the whole prompt."""
    text: str | None = None
    """A raw prompt's text after that of the parent; None if it was given by ids."""
    logprobs_mode: str = ""
    """See `SampleResponse.logprobs_mode`."""
    note: str = ""
    """Text of the caller's own, which sessions do not read."""
    created: float = 0.0
    """When it was appended, seconds since 1970; set by the store."""
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A conversation, as far as it is needed to find it in a session."""

    root: bytes
    keys: tuple[MessageKey, ...] = ()
    ids: NDArray[np.int32] | None = None
    """Token ids of a raw prompt."""
    text: str | None = None
    """Text of a raw prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The messages that a node adds to its parent's."""

    messages: bytes
    checksums: tuple[int, ...]
    reply: bytes
    checksum: int
    replaces: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The longest part of a conversation that a session has."""

    node: int | None = None
    """None: nothing."""
    matched: int = 0
    """How much of the conversation the node holds: messages, or tokens or characters of a raw prompt."""
    branch: Branch = ""
    """Why the conversation is not a plain continuation, as far as it is known before it is sampled."""
    ids: NDArray[np.int32] = field(default_factory=lambda: NO_IDS)
    """All token ids of the node. Shape [P + T]."""
    steps: tuple[Step, ...] = ()
    """Messages of the node and those before it, oldest first."""
    tools: bytes = b""
    """JSON of the tools; empty for none."""
    assistant_start: int = 0
    written: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """State of a session."""

    id: str
    created: float
    """Seconds since 1970."""
    expires: float
    """When it ends unless it is used before, seconds since 1970."""
    size_bytes: int
    """Of its turns on disk; in memory, without a directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """A session with all its turns. See `trajectory` and `features`."""

    info: SessionInfo
    turns: tuple[bytes, ...]
    """Each turn as `pack_turn` writes it."""


def dumps(value: object) -> bytes:
    """Writes JSON. Raises TypeError or ValueError for other values, RecursionError if it is nested too deeply."""
    return json.dumps(value, separators=(",", ":")).encode()


def loads(data: bytes) -> Any:
    """Reads JSON; None from no bytes."""
    return json.loads(data) if data else None


def joined_messages(steps: Sequence[Step]) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the messages of a node and those before it, and their checksums."""
    messages: list[dict[str, Any]] = []
    checksums: list[int] = []
    for step in steps:
        messages += loads(step.messages)
        checksums += step.checksums
        if step.reply:
            if step.replaces:
                del messages[-1:], checksums[-1:]
            messages.append(loads(step.reply))
            checksums.append(step.checksum)
    return messages, checksums
