"""Finds the messages, tool calls and tools that a chat template leaves out of the prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from twinkle_serve.data_format.messages import ChatMessage
from twinkle_serve.errors import PromptError

Render: TypeAlias = Callable[[list[ChatMessage], list[object] | None, bool], str]
"""Renders (messages, tools, generation prompt) to text."""
Position: TypeAlias = tuple[object, ...]
"""What a chat template may decide by whether it writes a message."""

MAX_POSITIONS = 4096
ELSEWHERE = "Leave it out, or give it another role or place."
AFTER_SAMPLED = 'It follows a sampled message here. Pass {"messages": …} only to encode the conversation again.'
TOOL_NAME = "probed_tool_name"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "-",
        "parameters": {
            "type": "object",
            "properties": {"value": {"type": "string", "description": "-"}},
            "required": ["value"],
        },
    },
}


class ReadingCheck:
    """Knows in which positions a chat template writes which messages.

    A conversation with a message in a new position is rendered once more, with a marker for each text, call and tool:
    one extra render for all conversations of the same form. Not thread-safe.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._written: set[Position] = set()

    def require_written(
        self,
        messages: list[ChatMessage],
        tools: list[object] | None,
        generation_prompt: bool,
        where: str,
        first: int,
        added: int,
    ) -> None:
        """Refuses a conversation of which the chat template leaves a part out.

        Args:
            messages: a conversation that the chat template accepts.
            tools: tools of the conversation.
            generation_prompt: whether to end at the beginning of the assistant's turn.
            where: name of the input in error messages.
            first: index in the input of the first message to check. If it is not 0, the text must follow that of the
                message before.
            added: number of messages before those of the input.

        Raises:
            PromptError: a message, its tool calls, or the tools are not in the text.
        """
        begin = first + added if first else 0
        positions = {*_positions(messages, bool(tools), begin)}
        if positions <= self._written:
            return
        marked = [_marked(message, j) for j, message in enumerate(messages)]
        text: str | None = None
        # It may raise if the template reads the texts themselves; it has accepted the real ones.
        with contextlib.suppress(Exception):
            text = self._render(marked, [TOOL] if tools else None, generation_prompt).lower()
        if text is not None and begin and text.count(_last_marker(messages, begin - 1)) != 1:
            return  # refused by the caller, which looks for the message before
        if text is not None:
            _check(text, messages, bool(tools), where, begin, added)
        if len(self._written) > MAX_POSITIONS:
            self._written.clear()
        self._written |= positions


def _positions(messages: Sequence[ChatMessage], tools: bool, first: int) -> Iterator[Position]:
    roles = [message["role"] for message in messages]
    seen: set[str] = set()
    called = False
    for j, message in enumerate(messages):
        role = roles[j]
        if j >= first:
            before = roles[j - 1] if j else None
            after = roles[j + 1] if j + 1 < len(roles) else None
            calls = min(2, len(message.get("tool_calls", ())))
            kind = _has_text(message) and type(message["content"])
            yield role, kind, calls, before, after, called, role in seen, tools, first > 0
        seen.add(role)
        called = "tool_calls" in message if role == "assistant" else called


def _check(text: str, messages: list[ChatMessage], tools: bool, where: str, begin: int, added: int) -> None:
    if tools and not begin and TOOL_NAME not in text:
        raise PromptError(f"{where}: the model's chat template does not read tools here. Leave them out.")
    start = text.find(_last_marker(messages, begin - 1)) if begin else 0
    for j, message in enumerate(messages[begin:], begin):
        name = f"{where}.messages[{j - added}]" if j >= added else f"{where}: the template's system prompt"
        calls = len(message.get("tool_calls", ()))
        if _has_text(message) and text.find(_marker(j, "content"), start) < 0:
            beside = " beside tool_calls" if calls else ""
            raise PromptError(
                f"{name}: the model's chat template leaves the content of a message with role {message['role']!r}"
                f"{beside} out of the prompt here. {AFTER_SAMPLED if begin else ELSEWHERE}"
            )
        written = sum(text.find(_marker(j, f"call{k}"), start) >= 0 for k in range(calls))
        if written < calls:
            raise PromptError(
                f"{name}.tool_calls: the model's chat template does not read {'them' if not written else 'all of them'}"
                f" here. {AFTER_SAMPLED if begin else 'Write them into the content of the message.'}"
            )


def _has_text(message: ChatMessage) -> bool:
    content = message.get("content")
    return bool(content.strip()) if isinstance(content, str) else bool(content)


def _marker(index: int, key: str) -> str:
    return f"probed{index}{key}mark"


def _last_marker(messages: Sequence[ChatMessage], index: int) -> str:
    """The marker after which later messages are written."""
    calls = len(messages[index].get("tool_calls", ()))
    return _marker(index, f"call{calls - 1}" if calls else "content")


def _marked(message: ChatMessage, index: int) -> ChatMessage:
    """Copies a message with markers for its texts."""
    marked = dict(message)
    if _has_text(message):
        marker = _marker(index, "content")
        marked["content"] = marker if isinstance(message["content"], str) else {"value": marker}
    if "tool_calls" in message:
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": {"value": _marker(index, f"call{k}")}}}
            for k, call in enumerate(message["tool_calls"])
        ]
    return marked
