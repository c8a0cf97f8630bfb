"""Canonical form of messages: what stays the same when a client sends a conversation back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from twinkle_serve.data_format.messages import reasoning_of
from twinkle_serve.data_format.plain import as_items, is_absent, plain
from twinkle_serve.errors import PromptError

KEY_BYTES = 16
"""Size of a digest. A collision takes 2**64 attempts, and would mix up a client's own session alone, so digests are
trusted: comparing the messages themselves would keep a canonical copy of each in memory."""

ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=repr)

CallPlace: TypeAlias = tuple[int, int]
"""A tool call: index of its message in the conversation, and its own index there."""


class MessageKey(NamedTuple):
    """Identifies a message of a conversation, whatever its serialisation."""

    digest: bytes
    """Of everything but the reasoning."""
    reasoning: bytes
    """Digest of the reasoning; empty without any."""
    is_reply: bool
    """Whether its role is assistant."""


class CallIds:
    """The tool calls of a conversation by their ids. An id that is used again means the later call."""

    def __init__(self) -> None:
        self._places: dict[str, CallPlace] = {}
        self._messages = 0

    def add(self, message: Mapping[str, Any]) -> None:
        """Adds the calls of the next message."""
        for i, call in enumerate(_calls(message)):
            if isinstance(call, Mapping) and isinstance(call.get("id"), str):
                self._places[call["id"]] = (self._messages, i)
        self._messages += 1

    def place(self, call_id: object) -> CallPlace | None:
        """Returns the call with an id; None if there is none before."""
        return self._places.get(call_id) if isinstance(call_id, str) else None


def message_keys(messages: Sequence[Any]) -> list[MessageKey]:
    """Returns the key of each message of a conversation.

    Raises:
        PromptError: a message is not a dict, or is nested too deeply.
    """
    ids, keys = CallIds(), []
    for j, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"messages[{j}] must be a dict with a role, got {message!r:.80}.")
        try:
            keys.append(_key(message, ids))
        except RecursionError:
            raise PromptError(f"messages[{j}] is nested too deeply.") from None
        ids.add(message)
    return keys


def reply_key(message: Mapping[str, Any]) -> MessageKey:
    """Returns the key of an assistant's message; it does not depend on the messages before."""
    return _key(message, CallIds())


def root_key(kind: str, tools: object, variant: str) -> bytes:
    """Returns the key of the conversations that have these tools.

    Args:
        kind: messages or raw.
        variant: anything else that decides which tokens the messages become.
    """
    return _digest([kind, None if is_absent(tools) else _without_nulls(plain(tools)), variant])


def _key(message: Mapping[str, Any], ids: CallIds) -> MessageKey:
    role, call_id = message.get("role"), message.get("tool_call_id")
    values = [
        plain(role),
        _content(message.get("content")),
        [_call(call) for call in _calls(message)],
        ids.place(call_id) or plain(call_id) or None,
        plain(message.get("name")) or None,
    ]
    return MessageKey(_digest(values), _reasoning(message), role == "assistant")


def _reasoning(message: Mapping[str, Any]) -> bytes:
    if message.get("reasoning_content") is None and message.get("reasoning") is None:  # of most messages
        return b""
    reasoning = reasoning_of(message)
    return b"" if is_absent(reasoning) else _digest(plain(reasoning))


def _calls(message: Mapping[str, Any]) -> list[Any]:
    calls = message.get("tool_calls")
    return [] if calls is None else as_items(calls) or []


def _content(content: object) -> object:
    """Returns the text of a message, or content of another kind in a list."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = as_items(content)
    texts = None if parts is None else [_text(part) for part in parts]
    if texts is None or None in texts:
        return [_numbers(plain(content))]
    return "".join(filter(None, texts))


def _text(part: object) -> str | None:
    """Returns the text of a part; None for another kind of part."""
    if isinstance(part, Mapping) and part.get("type") in (None, "text"):
        part = part.get("text")
    return part if isinstance(part, str) else None


def _call(call: object) -> object:
    """Returns name and arguments of a tool call."""
    entry = call if isinstance(call, Mapping) else {}
    function = entry.get("function")
    if not isinstance(function, Mapping):
        function = entry
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return [plain(function.get("name")), "text", arguments]
    return [plain(function.get("name")), "json", {} if arguments is None else _numbers(plain(arguments))]


def _numbers(value: Any) -> Any:
    """Writes whole numbers as integers, at every depth: JavaScript sends 1.0 back as 1."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return _numbers(value)


def _digest(value: object) -> bytes:
    return hashlib.blake2b(ENCODER.encode(value).encode(), digest_size=KEY_BYTES).digest()


def pack_keys(keys: Iterable[MessageKey]) -> bytes:
    """Writes keys as bytes, 2 x KEY_BYTES each, without `is_reply`."""
    return b"".join(key.digest + key.reasoning.rjust(KEY_BYTES, b"\0") for key in keys)


def unpack_keys(data: bytes) -> list[MessageKey]:
    """Reads keys that `pack_keys` wrote; `is_reply` is False in all of them."""
    keys = []
    for start in range(0, len(data), 2 * KEY_BYTES):
        digest, reasoning = data[start : start + KEY_BYTES], data[start + KEY_BYTES : start + 2 * KEY_BYTES]
        keys.append(MessageKey(digest, reasoning if any(reasoning) else b"", False))
    return keys
