"""Messages from deltas, and samples in random parts."""

from __future__ import annotations

import json
import random
from typing import Any

from twinkle_serve.data_format.message_stream import (
    ContentDelta,
    MessageDelta,
    MessageStream,
    ParsedCall,
    ParsedMessage,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallBegin,
)


def push_all(stream: MessageStream, parts: list[str]) -> list[MessageDelta]:
    deltas = [delta for part in parts for delta in stream.push(part)]
    return deltas + stream.push("", last=True)


def joined(deltas: list[MessageDelta]) -> ParsedMessage:
    """Puts deltas together, as a client does. Checks that a call begins before its arguments, and in order."""
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    begun: list[ToolCallBegin] = []
    texts: list[str] = []
    for delta in deltas:
        if isinstance(delta, ToolCallBegin):
            assert delta.index == len(begun)
            begun.append(delta)
            texts.append("")
        elif isinstance(delta, ToolCallArguments):
            texts[delta.index] += delta.text
    calls = [ParsedCall(call.id, call.name, _arguments(text), text) for call, text in zip(begun, texts, strict=True)]
    return ParsedMessage(content, reasoning, tuple(calls))


def _arguments(text: str) -> Any:
    """The object that a text is; the text if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def cut(text: str, seed: int) -> list[str]:
    """Cuts a text at random places; a part may be empty, or one character."""
    chance = random.Random(seed)
    size = chance.choice([1, 2, 5, 40])
    parts, at = [], 0
    while at < len(text):
        length = chance.randint(0, size)
        parts.append(text[at : at + length])
        at += length
    return parts
