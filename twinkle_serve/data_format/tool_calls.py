"""Parses tool calls from a sample's text, in the formats that models write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from twinkle_serve.data_format.call_streams import (
    CallsAndEnd,
    CallScanner,
    CallStream,
    HeldCalls,
    Piece,
    Source,
    Waiting,
    await_found,
    await_json,
    await_literal,
    await_match,
    await_space,
    json_at,
    json_parts,
    skip_space,
)
from twinkle_serve.data_format.json_schemas import declared_types, properties_of, values_of, variants_of
from twinkle_serve.errors import TemplateError, unknown_name


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a function."""

    name: str
    """Name of the function."""
    arguments: dict[str, Any]
    """Parsed arguments by name."""
    id: str | None = None
    """Id that the model wrote; None if it wrote none."""
    written: str | None = field(default=None, compare=False)
    """JSON text of the arguments as the model wrote it; None if it wrote none, or invalid JSON."""

    @property
    def text(self) -> str:
        """The arguments as JSON text: `written`, if the model wrote any."""
        return json_text(self.arguments) if self.written is None else self.written


def json_text(value: object) -> str:
    """Writes JSON; escapes characters that are not ASCII only if there is half a surrogate pair among them."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isascii() or not re.search("[\ud800-\udfff]", text) else json.dumps(value, default=str)


Tools: TypeAlias = Sequence[object]
"""Tools of the conversation, as passed by the caller."""
Parsed: TypeAlias = tuple[str, list[ToolCall]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolParser:
    """A format of tool calls."""

    parse: Callable[[str, Tools], Parsed]
    """Maps (text, tools) to (text without the calls, calls in order). Malformed calls stay in the text."""
    markers: tuple[str, ...]
    """Texts of the markup. They are passed to `parse` even if they are special tokens."""
    sign: str = ""
    """Text in a chat template by which the format is recognised; "" for never."""
    stream: Callable[[Tools], CallStream] | None = None
    """Makes a parser of text that arrives in parts, given the tools. None: text is held back until the sample is
    complete, and `parse` parses it."""

    def calls(self, tools: Tools) -> CallStream:
        """Makes a parser of one sample."""
        return HeldCalls(lambda text: self.parse(text, tools)) if self.stream is None else self.stream(tools)


def register_tool_parser(name: str, parser: ToolParser) -> None:
    """Registers a format of tool calls in this process.

    The service looks the name up when it makes a template, and the caller's process when it parses a message.

    Args:
        name: new name in TOOL_PARSERS.
        parser: the format.

    Raises:
        TemplateError: another parser has that name.
    """
    if TOOL_PARSERS.get(name, parser) != parser:
        raise TemplateError(f"tool parser {name!r} is registered already. Give yours another name.")
    TOOL_PARSERS[name] = parser


def tool_parser(name: str) -> ToolParser:
    """Returns the parser registered as `name`.

    Raises:
        TemplateError: unknown name.
    """
    if name not in TOOL_PARSERS:
        raise TemplateError(f"{unknown_name('tool parser', name, TOOL_PARSERS)}. See register_tool_parser.")
    return TOOL_PARSERS[name]


def read_both_dialects() -> None:
    """Makes `hermes` and `qwen3_coder` read each other's calls too in this process, as Twinkle's parser does."""
    for name in ("hermes", "qwen3_coder"):
        TOOL_PARSERS[name] = replace(TOOL_PARSERS["hermes_qwen"], sign=TOOL_PARSERS[name].sign)


def recognise_tool_parser(chat_template: str) -> str:
    """Name of the parser for the tool calls of a chat template; hermes if it writes none in a known format."""
    return next(
        (name for name, parser in TOOL_PARSERS.items() if parser.sign and parser.sign in chat_template), "hermes"
    )


# -- JSON ----------------------------------------------------------------------------------------


def _arguments_of(value: object) -> dict[str, Any] | None:
    """Arguments of a call, which may be JSON in a string; null and "" are none. None if invalid."""
    if isinstance(value, str):
        parsed = json_at(value, 0) if value.strip() else (None, len(value))
        if parsed is None or value[parsed[1] :].strip():
            return None
        value = parsed[0]
    if value is None:
        return {}
    return value if isinstance(value, dict) else None


def _call_of(value: object) -> ToolCall | None:
    """Converts `{"name": …, "arguments": …}` to a call; `parameters` may stand for arguments. None if invalid."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    keys = ("arguments", "parameters")
    if not any(key in value for key in keys) and not set(value) <= {"name", "id", "type"}:
        return None  # its arguments may be under another name
    given = [value[key] for key in keys if value.get(key) is not None]
    arguments = _arguments_of(given[0] if given else None)
    if arguments is None or len(given) > 1:
        return None
    call_id = value.get("id")
    return ToolCall(value["name"], arguments, call_id if isinstance(call_id, str) and call_id else None)


def _calls_of(value: object, text: str) -> list[ToolCall]:
    """Converts a call, or a list of calls, with their JSON text. [] if it is empty or one of them is invalid."""
    items = [text]
    if isinstance(value, list):
        items = [part for _, part in json_parts(text, 0)]
    calls = [_call_of(item) for item in (value if isinstance(value, list) else [value])]
    whole = [_as_written(call, part) for call, part in zip(calls, items, strict=True) if call is not None]
    return whole if len(whole) == len(calls) else []


def _as_written(call: ToolCall, text: str) -> ToolCall:
    """Adds the text of its arguments to a call that was parsed from JSON."""
    parts = dict(json_parts(text, 0))
    given = [parts[key] for key in ("arguments", "parameters") if parts.get(key, "null") != "null"]
    return replace(call, written=_written(given[0] if given else ""))


def _written(text: str) -> str | None:
    """The JSON object that arguments were written as, perhaps in a string; None if there is none or it is not valid."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            text, value = value.strip(), json.loads(value)
        text.encode()
    except (ValueError, RecursionError):  # a UnicodeEncodeError is a ValueError
        return None
    return text if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class _WholeText:
    """Parses a complete text with a parser of parts."""

    stream: Callable[[Tools], CallStream]

    def __call__(self, text: str, tools: Tools) -> Parsed:
        pieces = self.stream(tools).push(text, last=True)
        rest = "".join(piece for piece in pieces if isinstance(piece, str))
        return rest, [piece for piece in pieces if not isinstance(piece, str)]


def _streamed(stream: Callable[[Tools], CallStream], markers: tuple[str, ...], sign: str = "") -> ToolParser:
    return ToolParser(parse=_WholeText(stream), markers=markers, sign=sign, stream=stream)


# -- hermes: <tool_call>{"name": …, "arguments": …}</tool_call> ----------------------------------

_TOOL_CALL, _END_TOOL_CALL = "<tool_call>", "</tool_call>"


def _read_hermes(source: Source, at: int) -> Waiting[CallsAndEnd]:
    """Reads the calls in a tag: one, a list, or one after the other."""
    at += len(_TOOL_CALL)
    malformed: CallsAndEnd = ([], at)
    calls: list[ToolCall] = []
    while True:
        at = yield from await_space(source, at)
        parsed = yield from await_json(source, at)
        if parsed is None or not (read := _calls_of(parsed[0], source.text[at : parsed[1]])):
            return malformed
        calls += read
        # The end of the text closes the tag too: a stop string may have cut it.
        at = yield from await_space(source, parsed[1])
        if at == len(source.text):
            return calls, at
        if (yield from await_literal(source, at, _END_TOOL_CALL)):
            return calls, at + len(_END_TOOL_CALL)
        at += source.text.startswith(",", at)


def _hermes_calls(tools: Tools) -> CallStream:
    return CallScanner((_TOOL_CALL,), _read_hermes)


# -- qwen3_coder: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>

_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_END_NAME = re.compile(r"[<>\n]")
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def parameters_of(tools: Tools, function: str) -> Mapping[str, object]:
    """The JSON schema of a function's parameters; `{}` if the tools do not declare it."""
    for tool in tools:
        described = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(described, Mapping) and described.get("name") == function:
            parameters = described.get("parameters")
            if isinstance(parameters, str) and (parsed := json_at(parameters, 0)) is not None:
                parameters = parsed[0]
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def _value(text: str, declared: object, root: object) -> object:
    """A parameter's value: one that its schema lists, text if it is declared as a string, else parsed if it is JSON or
    one of Python's constants.

    Chat templates write true as True.
    """
    types = declared_types(declared, root)
    bare = text.strip()
    listed = [value for variant in variants_of(declared, root) for value in values_of(variant)]
    if text in listed:
        return text
    for value in listed:
        if not isinstance(value, str) and bare in (str(value), json.dumps(value, default=str)):
            return value
    if "null" in types and (text == "null" or (bare == "None" and "string" not in types)):
        return None
    if "string" in types:
        return text
    if "boolean" in types and bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    parsed = json_at(text, 0)
    return parsed[0] if parsed and not text[parsed[1] :].strip() else text


def _xml_call(name: str, body: str, tools: Tools) -> ToolCall | None:
    """Parses the parameters of a call; None if there is other text among them."""
    if _PARAMETER.sub("", body).strip():
        return None
    schema = parameters_of(tools, name)
    declared, others = properties_of(schema, schema) or {}, schema.get("additionalProperties")
    arguments = {key: _value(value, declared.get(key, others), schema) for key, value in _PARAMETER.findall(body)}
    return ToolCall(name, arguments)


def _read_function(source: Source, at: int, tools: Tools) -> Waiting[CallsAndEnd | None]:
    """Reads the call of one function. None: there is none at this index."""
    if (yield from await_literal(source, at, _TOOL_CALL)):
        at = yield from await_space(source, at + len(_TOOL_CALL))
    if not (yield from await_literal(source, at, _FUNCTION)):
        return None
    at += len(_FUNCTION)
    name = yield from await_match(source, at, _END_NAME)
    if name is None or name.group() != ">" or name.start() == at:
        return None
    body, function = name.end(), source.text[at : name.start()].strip()
    del name
    end = yield from await_found(source, body, _END_FUNCTION)
    if end is None:
        return None
    call, end = _xml_call(function, source.text[body:end], tools), end + len(_END_FUNCTION)
    if call is None:
        return [], end
    at = yield from await_space(source, end)
    if at == len(source.text):
        return [call], at
    closed = yield from await_literal(source, at, _END_TOOL_CALL)
    return [call], at + len(_END_TOOL_CALL) if closed else end


def _behind_opening(source: Source, at: int) -> int:
    return at + len(_TOOL_CALL if source.text.startswith(_TOOL_CALL, at) else _FUNCTION)


def _read_qwen3_coder(source: Source, at: int, tools: Tools) -> Waiting[CallsAndEnd]:
    read = yield from _read_function(source, at, tools)
    return ([], _behind_opening(source, at)) if read is None else read


def _qwen3_coder_calls(tools: Tools) -> CallStream:
    return CallScanner((_TOOL_CALL, _FUNCTION), partial(_read_qwen3_coder, tools=tools))


# -- hermes_qwen: Twinkle's parser, which reads both of the above ---------------------------------


def _read_either(source: Source, at: int, tools: Tools) -> Waiting[CallsAndEnd]:
    read = yield from _read_function(source, at, tools)
    if read is not None:
        return read
    if source.text.startswith(_TOOL_CALL, at):
        return (yield from _read_hermes(source, at))
    return [], _behind_opening(source, at)


def _hermes_qwen_calls(tools: Tools) -> CallStream:
    return CallScanner((_TOOL_CALL, _FUNCTION), partial(_read_either, tools=tools))


# -- llama3_json: {"name": …, "parameters": …}, alone or after <|python_tag|> --------------------

_PYTHON_TAG = "<|python_tag|>"


def _llama_calls(text: str) -> Iterator[ToolCall | None]:
    at = skip_space(text, 0)
    while at < len(text):
        parsed = json_at(text, at)
        values = parsed[0] if parsed and isinstance(parsed[0], list) else [parsed[0] if parsed else None]
        for value in values:
            if not isinstance(value, dict) or not {"parameters", "arguments"} & set(value):
                yield None
                return
        if parsed is None:
            return
        calls = _calls_of(parsed[0], text[at : parsed[1]])
        if values and not calls:
            yield None
        yield from calls
        at = skip_space(text, parsed[1])
        if text.startswith(";", at):
            at = skip_space(text, at + 1)


def _parse_llama3_json(text: str, tools: Tools) -> Parsed:
    before, tag, after = text.partition(_PYTHON_TAG)
    if not tag:
        if not tools:  # unmarked JSON is an answer, unless tools were offered
            return text, []
        before, after = "", text
    calls = list(_llama_calls(after))
    whole = [call for call in calls if call is not None]
    return (before, whole) if whole and len(whole) == len(calls) else (text, [])


class _LlamaCalls:
    """Holds text back from the tag on, and from the beginning if it may be JSON that stands for calls."""

    def __init__(self, tools: Tools) -> None:
        self._calls = HeldCalls(lambda text: _parse_llama3_json(text, tools), (_PYTHON_TAG,))
        self._may_be_json = bool(tools)
        self._space = ""

    def push(self, text: str, last: bool = False) -> list[Piece]:
        if self._may_be_json:
            text, self._space = self._space + text, ""
            begun = text.lstrip()
            if not begun and not last:
                self._space = text
                return []
            self._may_be_json = False
            if begun.startswith(("{", "[")):
                self._calls.hold()
        return self._calls.push(text, last)


# -- mistral: [TOOL_CALLS][{"name": …, "arguments": …}], later [TOOL_CALLS]name[ARGS]{…} ---------

_TOOL_CALLS, _CALL_ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_END_WORD, _END_FUNCTION_NAME = re.compile(r"\W"), re.compile(r"[^\w.-]")


def _read_mistral(source: Source, at: int) -> Waiting[CallsAndEnd]:
    malformed: CallsAndEnd = ([], at + len(_TOOL_CALLS))
    at = yield from await_space(source, at + len(_TOOL_CALLS))
    if source.text.startswith("[", at):
        listed = yield from await_json(source, at)
        calls = _calls_of(listed[0], source.text[at : listed[1]]) if listed else []
        return (calls, listed[1]) if listed and calls else malformed
    name, at = yield from _await_word(source, at, _END_FUNCTION_NAME)
    call_id = None
    if (yield from await_literal(source, at, _CALL_ID)):
        call_id, at = yield from _await_word(source, at + len(_CALL_ID), _END_WORD)
    if (yield from await_literal(source, at, _ARGS)):
        at += len(_ARGS)
    at = yield from await_space(source, at)
    parsed = yield from await_json(source, at)
    arguments = _arguments_of(parsed[0]) if parsed else None
    if not name or call_id == "" or parsed is None or arguments is None:
        return malformed
    return [ToolCall(name, arguments, call_id, _written(source.text[at : parsed[1]]))], parsed[1]


def _await_word(source: Source, at: int, end: re.Pattern[str]) -> Waiting[tuple[str, int]]:
    """Reads up to a character that matches `end`, or to the end of the text. Returns the word and its end."""
    match = yield from await_match(source, at, end)
    stop = len(source.text) if match is None else match.start()
    return source.text[at:stop], stop


def _mistral_calls(tools: Tools) -> CallStream:
    return CallScanner((_TOOL_CALLS,), _read_mistral)


# -- deepseek: V3 and R1 put the JSON in a fence, V3.1 does not ----------------------------------

_DEEPSEEK = re.compile(r"<｜tool▁call▁begin｜>([^<\n]*)<｜tool▁sep｜>(?:([^\n{`]+)\n```json\n)?")
_DEEPSEEK_CALL = "<｜tool▁call▁begin｜>"
_DEEPSEEK_FRAME = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")


def _read_deepseek(match: re.Match[str]) -> CallsAndEnd | None:
    text, name = match.string, (match[2] or match[1]).strip()
    closing = "```" if match[2] else "<｜tool▁call▁end｜>"
    value, at, written = None, match.end(), ""
    if not text.startswith(closing, skip_space(text, at)):  # else without arguments
        parsed = json_at(text, at)
        if parsed is None:
            return None
        value, at = parsed
        written = text[match.end() : at].strip()
    arguments = _arguments_of(value)
    if arguments is None or not name:
        return None
    if match[2]:
        fence = skip_space(text, at)
        at = fence + 3 if text.startswith("```", fence) else at
    end = _closed(text, at, "<｜tool▁call▁end｜>")
    return None if end is None else ([ToolCall(name, arguments, written=_written(written))], end)


def _parse_deepseek(text: str) -> Parsed:
    rest, calls = _scan(text, _DEEPSEEK, _read_deepseek)
    if calls and _DEEPSEEK_CALL not in rest:
        for frame in _DEEPSEEK_FRAME:
            rest = rest.replace(frame, "")
    return rest, calls


def _deepseek_calls(tools: Tools) -> CallStream:
    # Whether the frame is removed depends on all of the calls in it.
    return HeldCalls(_parse_deepseek, (*_DEEPSEEK_FRAME, _DEEPSEEK_CALL))


def _scan(text: str, opening: re.Pattern[str], read: Callable[[re.Match[str]], CallsAndEnd | None]) -> Parsed:
    """Applies `read` wherever `opening` matches. Returns the text around the calls, and the calls."""
    kept: list[str] = []
    calls: list[ToolCall] = []
    at = 0
    while match := opening.search(text, at):
        result = read(match)
        if result is None:
            kept.append(text[at : match.end()])
            at = match.end()
        else:
            kept.append(text[at : match.start()])
            calls += result[0]
            at = result[1]
    kept.append(text[at:])
    return "".join(kept), calls


def _closed(text: str, at: int, tag: str) -> int | None:
    """Index after `tag`, which space may precede; the end of the text counts too, as a stop string may have cut it."""
    at = skip_space(text, at)
    if text.startswith(tag, at):
        return at + len(tag)
    return at if at == len(text) else None


_XML_MARKERS = (_TOOL_CALL, _END_TOOL_CALL, _FUNCTION, _END_FUNCTION, "<parameter=", "</parameter>")

TOOL_PARSERS: dict[str, ToolParser] = {
    # Before hermes: both write <tool_call>.
    "qwen3_coder": _streamed(_qwen3_coder_calls, _XML_MARKERS, sign=_FUNCTION),
    "hermes": _streamed(_hermes_calls, (_TOOL_CALL, _END_TOOL_CALL), sign=_TOOL_CALL),
    "hermes_qwen": _streamed(_hermes_qwen_calls, _XML_MARKERS),
    "mistral": _streamed(_mistral_calls, (_TOOL_CALLS, _CALL_ID, _ARGS), sign=_TOOL_CALLS),
    "deepseek": _streamed(
        _deepseek_calls,
        (*_DEEPSEEK_FRAME, _DEEPSEEK_CALL, "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
        sign=_DEEPSEEK_CALL,
    ),
    "llama3_json": _streamed(_LlamaCalls, (_PYTHON_TAG,), sign=_PYTHON_TAG),
}
"""Formats of tool calls by name."""
