"""Replies in Anthropic's form: whole, and as the events of a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from twinkle_serve.data_format.message_stream import (
    ContentDelta,
    MessageDelta,
    ParsedMessage,
    ReasoningDelta,
    ToolCallBegin,
)
from twinkle_serve.gateway.anthropic.history import INVALID_JSON
from twinkle_serve.gateway.conversations import Finish, deltas_of
from twinkle_serve.gateway.prefill import PrefillRemover

STOP_REASONS: Mapping[Finish, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "abort": "pause_turn",
}
"""`pause_turn`: an update of weights, or a pause, ended the reply early. Sent back, it is continued."""

Event = dict[str, Any]


def new_id() -> str:
    """Returns an id for a message."""
    return f"msg_{uuid.uuid4().hex}"


def usage(input_tokens: int, output_tokens: int) -> dict[str, int]:
    """Returns `usage`. Tokens of cached prefixes are part of `input_tokens`."""
    return {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }


def end_of(finish: Finish, stop_sequence: str | None) -> dict[str, str | None]:
    """Returns why a reply ended.

    Args:
        stop_sequence: the one that it ended with, if any.
    """
    if finish == "stop" and stop_sequence is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_sequence}
    return {"stop_reason": STOP_REASONS[finish], "stop_sequence": None}


def header(message_id: str, model: str, input_tokens: int) -> dict[str, Any]:
    """Returns a message of which nothing is sampled yet."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage(input_tokens, 0),
    }


def content_of(message: ParsedMessage, prefill: str = "") -> list[dict[str, Any]]:
    """Returns the blocks of a reply.

    Args:
        prefill: text of the client's own with which the message begins; it is left out.
    """
    blocks: list[dict[str, Any]] = []
    remover = PrefillRemover(prefill)
    for delta in deltas_of(message):
        if isinstance(delta, ReasoningDelta):
            blocks.append({"type": "thinking", "thinking": delta.text, "signature": ""})
        elif isinstance(delta, ContentDelta) and (text := remover.push(delta.text, last=True)):
            blocks.append({"type": "text", "text": text})
    for call in message.calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.text)})
    return blocks


def _input(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: text}


class MessageEvents:
    """Writes the events of one streamed message."""

    def __init__(self, prefill: str = "") -> None:
        """
        Args:
            prefill: as of `content_of`.
        """
        self._remover = PrefillRemover(prefill)
        self._blocks = 0
        self._open: str | None = None
        """Type of the block that is open; it is the last one."""
        self._of_call: dict[int, int] = {}
        """Index of the block of each call."""

    def begin(self, header: Mapping[str, Any]) -> list[Event]:
        """Returns the first events."""
        return [{"type": "message_start", "message": dict(header)}, {"type": "ping"}]

    def push(self, deltas: Sequence[MessageDelta], last: bool = False) -> list[Event]:
        """Returns the events of new parts of the message.

        Args:
            last: whether the message is complete.
        """
        events = [event for delta in deltas for event in self._events(delta)]
        if last:
            events += self._text(self._remover.push("", last=True))
        return events

    def end(
        self, end: Mapping[str, str | None], usage: Mapping[str, int], extra: Mapping[str, Any] | None = None
    ) -> list[Event]:
        """Returns the last events.

        Args:
            extra: fields of this service's own.
        """
        delta = {"type": "message_delta", "delta": dict(end), "usage": dict(usage), **(extra or {})}
        return [*self._close(), delta, {"type": "message_stop"}]

    def _events(self, delta: MessageDelta) -> list[Event]:
        if isinstance(delta, ContentDelta):
            return self._text(self._remover.push(delta.text))
        if isinstance(delta, ReasoningDelta):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            return [*self._begin(block), self._delta({"type": "thinking_delta", "thinking": delta.text})]
        if isinstance(delta, ToolCallBegin):
            events = self._close()
            self._of_call[delta.index] = self._blocks
            return [*events, *self._begin({"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}})]
        part = {"type": "input_json_delta", "partial_json": delta.text}
        return [self._delta(part, self._of_call[delta.index])]

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        return [*self._begin({"type": "text", "text": ""}), self._delta({"type": "text_delta", "text": text})]

    def _begin(self, block: Mapping[str, Any]) -> list[Event]:
        """Returns the events that open a block, unless one of its type is open."""
        if self._open == block["type"]:
            return []
        events = self._close()
        self._open = block["type"]
        self._blocks += 1
        return [*events, {"type": "content_block_start", "index": self._blocks - 1, "content_block": dict(block)}]

    def _close(self) -> list[Event]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._blocks - 1}]

    def _delta(self, delta: Mapping[str, Any], index: int | None = None) -> Event:
        at = self._blocks - 1 if index is None else index
        return {"type": "content_block_delta", "index": at, "delta": dict(delta)}
