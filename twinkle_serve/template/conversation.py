"""Validates the messages of an input and copies them into the form that chat templates read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from twinkle_serve.data_format.messages import ChatMessage
from twinkle_serve.errors import PromptError

MEDIA = ("images", "videos", "audios")


def conversation(messages: object, where: str) -> list[ChatMessage]:
    """Returns deep copies of the messages, with tool calls in OpenAI's form and their arguments parsed.

    Raises:
        PromptError: no message, one without a role, one that is not text, or an invalid tool call.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise PromptError(f"{where}.messages must be a list of at least one message, got {messages!r}.")
    return [_message(message, f"{where}.messages[{j}]") for j, message in enumerate(messages)]


@dataclass(frozen=True, slots=True)
class CallForm:
    """The form in which a chat template reads a message with tool calls."""

    content: str | None = ""
    """Content of a message with calls only: some templates write calls only if the content is None."""
    as_json: bool = False
    """Whether the arguments are JSON text, inserted verbatim (DeepSeek's), or a dict (Qwen's)."""

    def of(self, message: ChatMessage) -> ChatMessage:
        """Converts a message to this form."""
        if not message.get("tool_calls"):
            return message
        calls = [self._call(call) for call in message["tool_calls"]]
        return {**message, "content": message.get("content") or self.content, "tool_calls": calls}

    def _call(self, call: ChatMessage) -> ChatMessage:
        if not self.as_json:
            return call
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


CALL_FORMS = (CallForm(), CallForm(as_json=True), CallForm(content=None), CallForm(content=None, as_json=True))
PROBE = "probe_key"


def find_call_form(render: Callable[[list[ChatMessage]], str]) -> CallForm:
    """The first form for which `render` writes a call's arguments as JSON or in tags; CallForm() if there is none."""
    call = {"id": "call00000", "type": "function", "function": {"name": "probe", "arguments": {PROBE: "-"}}}
    for form in CALL_FORMS:
        message = form.of({"role": "assistant", "content": "", "tool_calls": [call]})
        try:
            text = render([{"role": "user", "content": "-"}, message])
        except Exception:  # a model's template may raise anything; only its form matters here
            continue
        # Neither the repr of a dict nor JSON within JSON.
        if PROBE in text and f"'{PROBE}'" not in text and f'{PROBE}\\"' not in text:
            return form
    return CALL_FORMS[0]


def _message(message: object, where: str) -> ChatMessage:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f"{where} must be a dict with a role, got {message!r}.")
    for key in MEDIA:
        if message.get(key):
            raise PromptError(f"{where}.{key}: this service samples from text only. Leave it out.")
    clean = copy.deepcopy(dict(message))
    if isinstance(clean.get("content"), list):
        clean["content"] = "".join(_text(part, f"{where}.content[{k}]") for k, part in enumerate(clean["content"]))
    calls = clean.get("tool_calls")
    if calls is None:
        clean.pop("tool_calls", None)
        return clean
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise PromptError(f"{where}.tool_calls must be a list, got {calls!r}.")
    clean["tool_calls"] = [_call(call, f"{where}.tool_calls[{k}]") for k, call in enumerate(calls)]
    return clean


def _text(part: object, where: str) -> str:
    """Text of a part of a message. The caller joins parts: many chat templates ignore content that is not a string."""
    if isinstance(part, Mapping):
        kind = part.get("type", "text")
        if kind != "text":
            raise PromptError(f"{where} is of type {kind!r}: this service samples from text only.")
        part = part.get("text")
    if not isinstance(part, str):
        raise PromptError(f'{where} must be {{"type": "text", "text": …}}, got the text {part!r}.')
    return part


def _call(call: object, where: str) -> dict[str, object]:
    """Converts a call, nested in `function` or not, to `{"type": "function", "function": {"name", "arguments"}}`."""
    entry: Mapping[str, object] = call if isinstance(call, Mapping) else {}
    function = entry.get("function", entry)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f'{where} must be {{"function": {{"name": …, "arguments": …}}}}, got {call!r}.')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise PromptError(f"{where}: its arguments are not JSON ({error}): {arguments!r}.") from None
    if not isinstance(arguments, Mapping):
        raise PromptError(f"{where}: its arguments must be a dict or the JSON of one, got {arguments!r}.")
    _require_text_keys(arguments, where)
    extra = {key: value for key, value in entry.items() if key not in ("name", "arguments", "function")}
    return {"type": "function", **extra, "function": {"name": function["name"], "arguments": dict(arguments)}}


def _require_text_keys(value: object, where: str) -> None:
    """Refuses keys that JSON does not have, at every depth of a call's arguments: templates would write others."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise PromptError(f"{where}: its arguments have the key {key!r}, and JSON's keys are strings.")
            _require_text_keys(item, where)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _require_text_keys(item, where)
