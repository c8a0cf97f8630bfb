"""Items of an input, as the messages that templates read and sessions match.

Guarantees:
    A conversation has the same messages as by `/v1/chat/completions`, so that it can go on by either endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from twinkle_serve.data_format.messages import ChatMessage
from twinkle_serve.gateway.bodies import Body
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.parts import parse_part


class TextPart(Body):
    """Text of a message, or of a function's output."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(default=None, max_length=0)
    logprobs: list[Any] | None = None
    """No effect: clients send it back with an answer."""
    prompt_cache_breakpoint: Any = None
    """No effect: engines cache every prefix."""


class ReasoningText(Body):
    """Text of a reasoning item."""

    type: Literal["reasoning_text", "text"]
    text: str


class Item(Body):
    """Base of items; their ids and states say nothing to the model."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Any]
    phase: None = None

    def text(self, where: str) -> str:
        """Returns its text. Raises InvalidRequestError for other content."""
        return _text(self.content, f"{where}.content")


class ReasoningItem(Item):
    """Reasoning of an earlier reply."""

    type: Literal["reasoning"]
    summary: list[Any] = Field(default_factory=list, max_length=0)
    content: list[dict[str, Any]] | None = None
    encrypted_content: None = None

    def text(self, where: str) -> str:
        """Returns its text."""
        kinds = {"reasoning_text": ReasoningText, "text": ReasoningText}
        parts = [parse_part(part, kinds, f"{where}.content.{i}") for i, part in enumerate(self.content or ())]
        return "".join(part.text for part in parts if isinstance(part, ReasoningText))


class FunctionCallItem(Item):
    """A call of an earlier reply."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    caller: Any = None
    """No effect: it is the model in every case."""

    def as_call(self) -> dict[str, Any]:
        """Returns it in the form of chat completions."""
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class FunctionOutputItem(Item):
    """Result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Any]

    def as_message(self, where: str) -> ChatMessage:
        """Returns it in the form of chat completions."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output, f"{where}.output")}


KINDS: dict[str, type[Body]] = {
    "message": MessageItem,
    "reasoning": ReasoningItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
}
TEXT_KINDS: dict[str, type[Body]] = {"input_text": TextPart, "output_text": TextPart, "text": TextPart}


def messages_of(given: str | Sequence[Any]) -> list[ChatMessage]:
    """Returns the messages of an input.

    The items of one reply, its reasoning, text and calls, are one message.

    Raises:
        InvalidRequestError: an item of another type, or an invalid field.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given:
        raise InvalidRequestError("input is empty. Give a text, or at least one item.", "input")
    messages: list[ChatMessage] = []
    reply = _Reply()
    for i, value in enumerate(given):
        where = f"input.{i}"
        item = parse_part(value, KINDS, where, "message")
        if reply.ends_before(item):
            messages += reply.messages()
            reply = _Reply()
        if not reply.add(item, where):
            messages.append(_other(item, where))
    return messages + reply.messages()


def _other(item: Body, where: str) -> ChatMessage:
    if isinstance(item, FunctionOutputItem):
        return item.as_message(where)
    assert isinstance(item, MessageItem)
    return {"role": "system" if item.role == "developer" else item.role, "content": item.text(where)}


class _Reply:
    """A reply of which the items are being read."""

    def __init__(self) -> None:
        self._reasoning = ""
        self._texts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._has_text_last = False

    def ends_before(self, item: Body) -> bool:
        """Whether an item is not part of this reply. Text after text is another one, and reasoning after either."""
        if isinstance(item, FunctionCallItem):
            return False
        if isinstance(item, ReasoningItem):
            return bool(self._texts or self._calls)
        return self._has_text_last or not _is_reply(item)

    def add(self, item: Body, where: str) -> bool:
        """Adds an item. Returns whether it is part of a reply."""
        self._has_text_last = False
        if isinstance(item, FunctionCallItem):
            self._calls.append(item.as_call())
        elif isinstance(item, ReasoningItem):
            self._reasoning += item.text(where)
        elif isinstance(item, MessageItem) and _is_reply(item):
            self._texts.append(item.text(where))
            self._has_text_last = True
        else:
            return False
        return True

    def messages(self) -> list[ChatMessage]:
        """Returns the message; nothing if there were no items."""
        if not (self._texts or self._calls or self._reasoning):
            return []
        text = "".join(self._texts)
        message: ChatMessage = {"role": "assistant", "content": text}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message |= {"content": text or None, "tool_calls": self._calls}
        return [message]


def _is_reply(item: Body) -> bool:
    return isinstance(item, MessageItem) and item.role == "assistant"


def _text(content: str | Sequence[Any], where: str) -> str:
    if isinstance(content, str):
        return content
    parts = [parse_part(part, TEXT_KINDS, f"{where}.{i}") for i, part in enumerate(content)]
    return "".join(part.text for part in parts if isinstance(part, TextPart))
