"""Parses tool calls from a sample's text, in the formats that models write."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias

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


Tools: TypeAlias = Sequence[object]
"""Tools of the conversation, as passed by the caller."""
Parsed: TypeAlias = tuple[str, list[ToolCall]]
CallsAndEnd: TypeAlias = tuple[list[ToolCall], int]
"""Calls, and the index in the text where they end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolParser:
    """A format of tool calls."""

    parse: Callable[[str, Tools], Parsed]
    """Maps (text, tools) to (text without the calls, calls in order). Malformed calls stay in the text."""
    markers: tuple[str, ...]
    """Texts of the markup. They are passed to `parse` even if they are special tokens."""
    sign: str = ""
    """Text in a chat template by which the format is recognised; "" for never."""


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


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)  # 1e999


# Not strict: models write raw line breaks into strings.
_JSON = json.JSONDecoder(strict=False, parse_constant=_no_number, parse_float=_finite)
_SPACE = re.compile(r"\s*")


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _json_at(text: str, at: int) -> tuple[object, int] | None:
    """Parses the JSON value that begins at `at`, whatever follows it. Returns it and its end; None if it is invalid."""
    try:
        return _JSON.raw_decode(text, _skip_space(text, at))
    except (ValueError, RecursionError):  # samples can nest deeper than Python
        return None


def _arguments_of(value: object) -> dict[str, Any] | None:
    """Arguments of a call, which may be JSON in a string; null and "" are none. None if invalid."""
    if isinstance(value, str):
        parsed = _json_at(value, 0) if value.strip() else (None, len(value))
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


def _calls_of(value: object) -> list[ToolCall] | None:
    """Converts a call, or a list of calls. None if it is empty or one of them is invalid."""
    calls = [_call_of(item) for item in (value if isinstance(value, list) else [value])]
    whole = [call for call in calls if call is not None]
    return whole if whole and len(whole) == len(calls) else None


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
    at = _skip_space(text, at)
    if text.startswith(tag, at):
        return at + len(tag)
    return at if at == len(text) else None


# -- hermes: <tool_call>{"name": …, "arguments": …}</tool_call> ----------------------------------

_HERMES = re.compile("<tool_call>")


def _read_hermes(match: re.Match[str]) -> CallsAndEnd | None:
    """Reads the calls in a tag: one, a list, or one after the other."""
    text, at = match.string, match.end()
    calls: list[ToolCall] = []
    while (parsed := _json_at(text, at)) is not None:
        read = _calls_of(parsed[0])
        if read is None:
            return None
        calls += read
        if (end := _closed(text, parsed[1], "</tool_call>")) is not None:
            return calls, end
        at = _skip_space(text, parsed[1])
        at += text.startswith(",", at)
    return None


def _parse_hermes(text: str, tools: Tools) -> Parsed:
    return _scan(text, _HERMES, _read_hermes)


# -- qwen3_coder: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>

_FUNCTION = re.compile(r"(?:<tool_call>\s*)?<function=([^<>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def parameters_of(tools: Tools, function: str) -> Mapping[str, object]:
    """The JSON schema of a function's parameters; `{}` if the tools do not declare it."""
    for tool in tools:
        described = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(described, Mapping) and described.get("name") == function:
            parameters = described.get("parameters")
            if isinstance(parameters, str) and (parsed := _json_at(parameters, 0)) is not None:
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
    parsed = _json_at(text, 0)
    return parsed[0] if parsed and not text[parsed[1] :].strip() else text


def _read_qwen3_coder(match: re.Match[str], tools: Tools) -> CallsAndEnd | None:
    name, body = match[1].strip(), match[2]
    if _PARAMETER.sub("", body).strip():
        return None
    schema = parameters_of(tools, name)
    declared, others = properties_of(schema, schema) or {}, schema.get("additionalProperties")
    arguments = {key: _value(value, declared.get(key, others), schema) for key, value in _PARAMETER.findall(body)}
    end = _closed(match.string, match.end(), "</tool_call>")
    return [ToolCall(name, arguments)], match.end() if end is None else end


def _parse_qwen3_coder(text: str, tools: Tools) -> Parsed:
    return _scan(text, _FUNCTION, lambda match: _read_qwen3_coder(match, tools))


# -- hermes_qwen: Twinkle's parser, which reads both of the above ---------------------------------

_EITHER = re.compile(f"{_FUNCTION.pattern}|{_HERMES.pattern}", re.DOTALL)


def _parse_hermes_qwen(text: str, tools: Tools) -> Parsed:
    def read(match: re.Match[str]) -> CallsAndEnd | None:
        return _read_hermes(match) if match[1] is None else _read_qwen3_coder(match, tools)

    return _scan(text, _EITHER, read)


# -- llama3_json: {"name": …, "parameters": …}, alone or after <|python_tag|> --------------------

_PYTHON_TAG = "<|python_tag|>"


def _llama_calls(text: str) -> Iterator[ToolCall | None]:
    at = _skip_space(text, 0)
    while at < len(text):
        parsed = _json_at(text, at)
        values = parsed[0] if parsed and isinstance(parsed[0], list) else [parsed[0] if parsed else None]
        for value in values:
            if not isinstance(value, dict) or not {"parameters", "arguments"} & set(value):
                yield None
                return
            yield _call_of(value)
        if parsed is None:
            return
        at = _skip_space(text, parsed[1])
        if text.startswith(";", at):
            at = _skip_space(text, at + 1)


def _parse_llama3_json(text: str, tools: Tools) -> Parsed:
    before, tag, after = text.partition(_PYTHON_TAG)
    if not tag:
        if not tools:  # unmarked JSON is an answer, unless tools were offered
            return text, []
        before, after = "", text
    calls = list(_llama_calls(after))
    whole = [call for call in calls if call is not None]
    return (before, whole) if whole and len(whole) == len(calls) else (text, [])


# -- mistral: [TOOL_CALLS][{"name": …, "arguments": …}], later [TOOL_CALLS]name[ARGS]{…} ---------

_MISTRAL = re.compile(r"\[TOOL_CALLS\]")
_MISTRAL_NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\](\w+))?(?:\[ARGS\])?")


def _read_mistral(match: re.Match[str]) -> CallsAndEnd | None:
    text = match.string
    parsed = _json_at(text, match.end())
    if parsed and isinstance(parsed[0], list):
        calls = _calls_of(parsed[0])
        return None if calls is None else (calls, parsed[1])
    name = _MISTRAL_NAME.match(text, match.end())
    parsed = _json_at(text, name.end()) if name else None
    arguments = _arguments_of(parsed[0]) if parsed else None
    if name is None or parsed is None or arguments is None:
        return None
    return [ToolCall(name[1], arguments, name[2])], parsed[1]


def _parse_mistral(text: str, tools: Tools) -> Parsed:
    return _scan(text, _MISTRAL, _read_mistral)


# -- deepseek: V3 and R1 put the JSON in a fence, V3.1 does not ----------------------------------

_DEEPSEEK = re.compile(r"<｜tool▁call▁begin｜>([^<\n]*)<｜tool▁sep｜>(?:([^\n{`]+)\n```json\n)?")
_DEEPSEEK_FRAME = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")


def _read_deepseek(match: re.Match[str]) -> CallsAndEnd | None:
    text, name = match.string, (match[2] or match[1]).strip()
    closing = "```" if match[2] else "<｜tool▁call▁end｜>"
    value, at = (None, match.end())
    if not text.startswith(closing, _skip_space(text, at)):  # else without arguments
        parsed = _json_at(text, at)
        if parsed is None:
            return None
        value, at = parsed
    arguments = _arguments_of(value)
    if arguments is None or not name:
        return None
    if match[2]:
        fence = _skip_space(text, at)
        at = fence + 3 if text.startswith("```", fence) else at
    end = _closed(text, at, "<｜tool▁call▁end｜>")
    return None if end is None else ([ToolCall(name, arguments)], end)


def _parse_deepseek(text: str, tools: Tools) -> Parsed:
    rest, calls = _scan(text, _DEEPSEEK, _read_deepseek)
    if calls and "<｜tool▁call▁begin｜>" not in rest:
        for frame in _DEEPSEEK_FRAME:
            rest = rest.replace(frame, "")
    return rest, calls


TOOL_PARSERS: dict[str, ToolParser] = {
    # Before hermes: both write <tool_call>.
    "qwen3_coder": ToolParser(
        parse=_parse_qwen3_coder,
        markers=("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>"),
        sign="<function=",
    ),
    "hermes": ToolParser(parse=_parse_hermes, markers=("<tool_call>", "</tool_call>"), sign="<tool_call>"),
    "hermes_qwen": ToolParser(
        parse=_parse_hermes_qwen,
        markers=("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>"),
    ),
    "mistral": ToolParser(parse=_parse_mistral, markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), sign="[TOOL_CALLS]"),
    "deepseek": ToolParser(
        parse=_parse_deepseek,
        markers=(*_DEEPSEEK_FRAME, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
        sign="<｜tool▁call▁begin｜>",
    ),
    "llama3_json": ToolParser(parse=_parse_llama3_json, markers=(_PYTHON_TAG,), sign=_PYTHON_TAG),
}
"""Formats of tool calls by name."""
