"""Validates the messages of an input and copies them into the form that chat templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twinkle_serve.data_format.columns import is_media
from twinkle_serve.data_format.messages import ChatMessage, reasoning_of
from twinkle_serve.data_format.plain import as_items, is_absent, plain, shown
from twinkle_serve.data_format.tool_calls import parameters_of
from twinkle_serve.errors import PromptError
from twinkle_serve.template.tools import require_json, without_filled_arguments

TEXT_KEYS = ("reasoning_content", "name", "tool_call_id")
"""Keys of a message, besides its content, whose value is text."""
RESULT_ROLES = ("tool", "function", "ipython")
"""Roles of messages with a tool's result."""
ONLY_TEXT = "this service samples from text only"


def conversation(messages: object, where: str, tools: list[object] | None = None) -> list[ChatMessage]:
    """Returns deep copies of the messages, with tool calls in OpenAI's form and their arguments parsed.

    Keys without a value, as columnar formats fill them in, are left out. The content is text; of a tool's result, it
    may be a dict.

    Raises:
        PromptError: no message, one without a role, one that is not text, or an invalid tool call.
    """
    items = as_items(messages)
    if not items:
        raise PromptError(f"{where}.messages must be a list of at least one message, got {messages!r}.")
    return [_message(message, f"{where}.messages[{j}]", tools) for j, message in enumerate(items)]


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
PROBED = "probe_value"


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


def require_continuable(message: ChatMessage, where: str) -> str:
    """Returns the text of a message that a sample is to continue.

    Raises:
        PromptError: it has tool calls, or reasoning and no text, so that it does not end with its text.
    """
    if "tool_calls" in message:
        raise PromptError(f"{where} has tool_calls, and cannot be continued. Append the tools' results.")
    content = str(message["content"])
    if message.get("reasoning_content") and not content.strip():
        raise PromptError(
            f"{where} has reasoning_content and no content, and only content can be continued. Pass the "
            "new_input_feature of its sample, or input_ids."
        )
    return content


def with_last_arguments(message: ChatMessage, arguments: dict[str, object]) -> ChatMessage:
    """Copies a message with tool calls; its last call has other arguments."""
    *calls, last = message["tool_calls"]
    return {**message, "tool_calls": [*calls, {**last, "function": {**last["function"], "arguments": arguments}}]}


def write_results(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Converts tools' results that are dicts to JSON."""
    return [
        {**message, "content": json.dumps(message["content"], ensure_ascii=False)}
        if isinstance(message["content"], dict)
        else message
        for message in messages
    ]


def writes_objects(render: Callable[[list[ChatMessage]], str]) -> bool:
    """Whether `render` writes a tool's result that is a dict as JSON by itself."""
    call = {"id": "call00000", "type": "function", "function": {"name": "probe", "arguments": {}}}
    messages: list[ChatMessage] = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00000", "name": "probe", "content": {PROBE: PROBED}},
    ]
    try:
        return re.search(rf'"{PROBE}": ?"{PROBED}"', render(messages)) is not None
    except Exception:  # a model's template may raise anything; only its form matters here
        return False


def _message(message: object, where: str, tools: list[object] | None) -> ChatMessage:
    try:
        clean = plain(message)
    except RecursionError:
        raise PromptError(f"{where} is nested too deeply.") from None
    if not isinstance(clean, dict) or not isinstance(clean.get("role"), str) or not clean["role"]:
        raise PromptError(f"{where} must be a dict with a role, got {message!r}.")
    content, calls = clean.pop("content", None), clean.pop("tool_calls", None)
    if not is_absent(clean.get("function_call")):
        raise PromptError(f"{where}.function_call would be left out of the prompt. Write it as tool_calls.")
    for key, value in list(clean.items()):
        if is_media(key) and not is_absent(value):
            raise PromptError(f"{where}.{key}: {ONLY_TEXT}. Leave it out.")
        if is_media(key) or (is_absent(value) and not isinstance(value, (str, list, dict))):
            del clean[key]
        elif key in TEXT_KEYS and not isinstance(value, str):
            raise PromptError(f"{where}.{key} must be text, got {shown(value)}.")
    reasoning = reasoning_of(clean)
    if isinstance(reasoning, str):
        clean["reasoning_content"] = reasoning
    if not is_absent(calls):
        items = as_items(calls)
        if items is None:
            raise PromptError(f"{where}.tool_calls must be a list, got {calls!r}.")
        clean["tool_calls"] = [_call(call, f"{where}.tool_calls[{k}]", tools) for k, call in enumerate(items)]
    if content is None and clean["role"] == "assistant" and "tool_calls" in clean:
        return {**clean, "content": None}
    return {**clean, "content": _content(content, clean["role"], f"{where}.content")}


def _content(content: object, role: str, where: str) -> str | dict[str, object]:
    """Returns the text of a message, or a tool's result that is an object."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        # Many chat templates ignore content that is not a string.
        return "".join(_text(part, role, f"{where}[{k}]") for k, part in enumerate(content))
    if isinstance(content, dict) and role in RESULT_ROLES and content.get("type") != "text":
        require_json(content, f"{where} has")
        return content
    if isinstance(content, dict) and content.get("type") == "text":
        remedy = "Put the part into a list."
    elif role in RESULT_ROLES:
        remedy = "Write the result as text, for example with json.dumps."
    elif content is None and role == "assistant":
        remedy = 'It may be None beside tool_calls only. Write "" for an empty message.'
    else:
        remedy = 'Write "" for an empty message.' if content is None else "Convert it to text."
    raise PromptError(
        f'{where} of a message with role {role!r} must be text or a list of {{"type": "text", "text": …}}, got '
        f"{shown(content)}. {remedy}"
    )


def _text(part: object, role: str, where: str) -> str:
    """Text of a part of a message."""
    text = part
    if isinstance(part, dict):
        kind = part.get("type")
        if kind not in (None, "text"):
            raise PromptError(f"{where} is of type {kind!r}: {ONLY_TEXT}.")
        for key, value in part.items():
            if is_media(key) and not is_absent(value):
                raise PromptError(f"{where}.{key}: {ONLY_TEXT}. Leave it out.")
        text = part.get("text")
    if not isinstance(text, str):
        remedy = " Write a list of results as text, for example with json.dumps." if role in RESULT_ROLES else ""
        raise PromptError(f'{where} must be {{"type": "text", "text": …}} with a text, got {shown(part)}.{remedy}')
    return text


def _call(call: Any, where: str, tools: list[object] | None) -> dict[str, object]:
    """Converts a call, nested in `function` or not, to `{"type": "function", "function": {"name", "arguments"}}`."""
    entry: dict[str, Any] = call if isinstance(call, dict) else {}
    function = entry if is_absent(entry.get("function")) else entry["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise PromptError(f'{where} must be {{"function": {{"name": …, "arguments": …}}}}, got {call!r}.')
    name, arguments = function["name"], function.get("arguments")
    if arguments is None:
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: its arguments are not JSON ({error}): {arguments!r}.") from None
        arguments = {} if arguments is None else arguments
    elif isinstance(arguments, dict):
        schema = parameters_of(tools or (), name)
        arguments = without_filled_arguments(arguments, schema, schema)
    if not isinstance(arguments, dict):
        raise PromptError(f"{where}: its arguments must be a dict or the JSON of one, got {arguments!r}.")
    require_json(arguments, f"{where}: its arguments have")
    own = ("name", "arguments", "function")
    extra = {key: value for key, value in entry.items() if key not in own and not is_absent(value)}
    return {"type": "function", **extra, "function": {"name": name, "arguments": arguments}}
