"""Conversations in Anthropic's form, as the messages that templates read and sessions match.

Guarantees:
    A conversation has the same messages as by `/v1/chat/completions`, so that it can go on by either protocol.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Literal, TypeAlias

from pydantic import Field

from twinkle_serve.data_format.messages import ChatMessage
from twinkle_serve.gateway.bodies import Body
from twinkle_serve.gateway.parts import parse_at, parse_parts

INVALID_JSON = "INVALID_JSON"
"""Key of a tool_use's input that holds arguments that are not a JSON object, such as those of a sample cut short."""

ERROR_PREFIX = "Error: "
"""Stands in front of a tool's result with is_error: templates have no other way to say it."""


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = Field(default=None, max_length=0)


class ThinkingBlock(Body):
    """Thinking of an earlier reply."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Body):
    """Thinking that only its maker can read; it is not part of the prompt."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Body):
    """A call of an earlier reply."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    caller: Any = None
    """No effect: it is the model in every case."""

    def as_call(self) -> dict[str, Any]:
        """Returns it in OpenAI's form."""
        text = self.input.get(INVALID_JSON) if len(self.input) == 1 else None
        arguments = text if isinstance(text, str) else json.dumps(self.input, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class ToolResultBlock(Body):
    """Result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Any] | None = None
    is_error: bool = False
    cache_control: dict[str, Any] | None = None

    def as_message(self, where: str) -> ChatMessage:
        """Returns it in OpenAI's form."""
        parts = parse_parts(self.content or [], {"text": TextBlock}, f"{where}.content", TextBlock)
        text = _joined(parts)
        if self.is_error and not text.lower().startswith("error"):
            text = ERROR_PREFIX + text
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": text}


class Message(Body):
    """One of `messages`."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Any]


Blocks: TypeAlias = dict[str, type[Body]]

SYSTEM_BLOCKS: Blocks = {"text": TextBlock}
USER_BLOCKS: Blocks = {"text": TextBlock, "tool_result": ToolResultBlock}
ASSISTANT_BLOCKS: Blocks = {
    "text": TextBlock,
    "tool_use": ToolUseBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
}


def messages_of(system: str | Sequence[Any] | None, messages: Sequence[Any]) -> list[ChatMessage]:
    """Returns a conversation in OpenAI's form.

    Successive messages of the assistant are one, as in the protocol; so a reply that continued a message matches the
    message that a client makes of both.

    Raises:
        InvalidRequestError: a block of another type, such as an image, or an invalid field.
    """
    given: list[ChatMessage] = []
    if system:
        given.append({"role": "system", "content": _joined(parse_parts(system, SYSTEM_BLOCKS, "system", TextBlock))})
    parsed = [parse_at(value, Message, f"messages.{i}") for i, value in enumerate(messages)]
    for role, group in groupby(enumerate(parsed), key=lambda each: each[1].role):
        kinds = {"assistant": ASSISTANT_BLOCKS, "system": SYSTEM_BLOCKS}.get(role, USER_BLOCKS)
        contents = [
            (f"messages.{i}.content", parse_parts(message.content, kinds, f"messages.{i}.content", TextBlock))
            for i, message in group
        ]
        if role == "assistant":
            given.append(_assistant([block for _, blocks in contents for block in blocks]))
        elif role == "system":
            given += [{"role": role, "content": _joined(blocks)} for _, blocks in contents]
        else:
            given += [message for where, blocks in contents for message in _user(blocks, where)]
    return given


def _user(blocks: Sequence[Body], where: str) -> list[ChatMessage]:
    """Returns a user's message: one for each result of a tool, and for each text between them."""
    messages: list[ChatMessage] = []
    texts: list[Body] = []
    for i, block in enumerate(blocks):
        if not isinstance(block, ToolResultBlock):
            texts.append(block)
            continue
        if texts:
            messages.append({"role": "user", "content": _joined(texts)})
            texts = []
        messages.append(block.as_message(f"{where}.{i}"))
    if texts or not messages:
        messages.append({"role": "user", "content": _joined(texts)})
    return messages


def _assistant(blocks: Sequence[Body]) -> ChatMessage:
    text = _joined(blocks)
    message: ChatMessage = {"role": "assistant", "content": text}
    if reasoning := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
        message["reasoning_content"] = reasoning
    if calls := [block.as_call() for block in blocks if isinstance(block, ToolUseBlock)]:
        message |= {"content": text or None, "tool_calls": calls}
    return message


def _joined(blocks: Iterable[Body]) -> str:
    return "".join(block.text for block in blocks if isinstance(block, TextBlock))
