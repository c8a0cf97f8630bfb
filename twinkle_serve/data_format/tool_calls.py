"""Parses tool calls from a sample's text, in the formats that models write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

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


def recognise_tool_parser(chat_template: str) -> str:
    """Name of the parser for the tool calls of a chat template; hermes if it writes none in a known format."""
    return next(
        (name for name, parser in TOOL_PARSERS.items() if parser.sign and parser.sign in chat_template), "hermes"
    )


# -- JSON ----------------------------------------------------------------------------------------


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Not strict: models write raw line breaks into strings.
_JSON = json.JSONDecoder(strict=False, parse_constant=_no_number)
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


def _call_of(value: object, keys: Sequence[str] = ("arguments",)) -> ToolCall | None:
    """Converts `{"name": …, "arguments": …}` to a call; the arguments may be JSON in a string. None if invalid."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments: object = next((value[key] for key in keys if key in value), {})
    if isinstance(arguments, str):
        parsed = _json_at(arguments, 0)
        arguments = parsed[0] if parsed and not arguments[parsed[1] :].strip() else None
    if not isinstance(arguments, dict):
        return None
    call_id = value.get("id")
    return ToolCall(value["name"], arguments, call_id if isinstance(call_id, str) and call_id else None)


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
    parsed = _json_at(match.string, match.end())
    if parsed is None or (call := _call_of(parsed[0])) is None:
        return None
    end = _closed(match.string, parsed[1], "</tool_call>")
    return None if end is None else ([call], end)


def _parse_hermes(text: str, tools: Tools) -> Parsed:
    return _scan(text, _HERMES, _read_hermes)


# -- qwen3_coder: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>

_FUNCTION = re.compile(r"(?:<tool_call>\s*)?<function=([^<>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _properties(tools: Tools, function: str) -> Mapping[str, object]:
    """The declared parameters of a function, `{}` if the tools do not declare any."""
    for tool in tools:
        described = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(described, Mapping) and described.get("name") == function:
            parameters = described.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return properties if isinstance(properties, Mapping) else {}
    return {}


def _value(text: str, declared: object) -> object:
    """A parameter's value: text if it is declared as a string, else parsed if it is JSON."""
    kind = declared.get("type") if isinstance(declared, Mapping) else None
    kinds = kind if isinstance(kind, list) else [kind]
    if "string" in kinds and not (text == "null" and "null" in kinds):
        return text
    parsed = _json_at(text, 0)
    return parsed[0] if parsed and not text[parsed[1] :].strip() else text


def _parse_qwen3_coder(text: str, tools: Tools) -> Parsed:
    def read(match: re.Match[str]) -> CallsAndEnd | None:
        name, body = match[1].strip(), match[2]
        if _PARAMETER.sub("", body).strip():
            return None
        declared = _properties(tools, name)
        arguments = {key: _value(value, declared.get(key)) for key, value in _PARAMETER.findall(body)}
        end = _closed(text, match.end(), "</tool_call>")
        return [ToolCall(name, arguments)], match.end() if end is None else end

    return _scan(text, _FUNCTION, read)


# -- llama3_json: {"name": …, "parameters": …}, alone or after <|python_tag|> --------------------

_PYTHON_TAG = "<|python_tag|>"


def _llama_calls(text: str) -> Iterator[ToolCall | None]:
    at = _skip_space(text, 0)
    while at < len(text):
        parsed = _json_at(text, at)
        if parsed is None or not isinstance(parsed[0], dict) or not {"parameters", "arguments"} & set(parsed[0]):
            yield None
            return
        yield _call_of(parsed[0], ("parameters", "arguments"))
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
        calls = [_call_of(value) for value in parsed[0]]
        whole = [call for call in calls if call is not None]
        return (whole, parsed[1]) if whole and len(whole) == len(calls) else None
    name = _MISTRAL_NAME.match(text, match.end())
    parsed = _json_at(text, name.end()) if name else None
    if name is None or parsed is None or not isinstance(parsed[0], dict):
        return None
    return [ToolCall(name[1], parsed[0], name[2])], parsed[1]


def _parse_mistral(text: str, tools: Tools) -> Parsed:
    return _scan(text, _MISTRAL, _read_mistral)


# -- deepseek: V3 and R1 put the JSON in a fence, V3.1 does not ----------------------------------

_DEEPSEEK = re.compile(r"<｜tool▁call▁begin｜>([^<\n]*)<｜tool▁sep｜>(?:([^\n{`]+)\n```json\n)?")
_DEEPSEEK_FRAME = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")


def _read_deepseek(match: re.Match[str]) -> CallsAndEnd | None:
    parsed = _json_at(match.string, match.end())
    name = (match[2] or match[1]).strip()
    if parsed is None or not isinstance(parsed[0], dict) or not name:
        return None
    at = parsed[1]
    if match[2]:
        fence = _skip_space(match.string, at)
        at = fence + 3 if match.string.startswith("```", fence) else at
    end = _closed(match.string, at, "<｜tool▁call▁end｜>")
    return None if end is None else ([ToolCall(name, parsed[0])], end)


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
    "mistral": ToolParser(parse=_parse_mistral, markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), sign="[TOOL_CALLS]"),
    "deepseek": ToolParser(
        parse=_parse_deepseek,
        markers=(*_DEEPSEEK_FRAME, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
        sign="<｜tool▁call▁begin｜>",
    ),
    "llama3_json": ToolParser(parse=_parse_llama3_json, markers=(_PYTHON_TAG,), sign=_PYTHON_TAG),
}
"""Formats of tool calls by name."""
