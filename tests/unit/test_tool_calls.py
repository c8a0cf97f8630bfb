"""Parsing a sample's text into the assistant's message."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.data_format.tool_calls import TOOL_PARSERS, ToolCall, ToolParser, register_tool_parser
from twinkle_serve.errors import TemplateError

THINK = ("<think>", "</think>")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"properties": {"s": {"type": "string"}, "n": {"type": ["string", "null"]}, "i": {}}},
        },
    }
]


def read(name: str | None, text: str, tools: Any = (), special: tuple[str, ...] = ()) -> tuple[str, list[Any]]:
    """Parses a text into (content, [(name, arguments)])."""
    message = MessageParser(tool_parser=name, special_tokens=special).message(text, tools)
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    return message["content"], calls


ONE = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": {"b": "}"}}<｜tool▁call▁end｜>'


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "no call", "no call", []),
        ("hermes", f"Look:\n{ONE}", "Look:", [("f", {"a": 1})]),
        ("hermes", f"{ONE}\n{ONE}", "", [("f", {"a": 1}), ("f", {"a": 1})]),
        ("hermes", ONE.removesuffix("</tool_call>"), "", [("f", {"a": 1})]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\nb"}}</tool_call>',
            "",
            [("f", {"a": "</tool_call>\nb"})],
        ),
        ("hermes", f"a <tool_call>{{bad</tool_call> b {ONE}", "a <tool_call>{bad</tool_call> b", [("f", {"a": 1})]),
        (
            "qwen3_coder",
            "Go.\n<tool_call>\n<function=f>\n<parameter=a>\n[1,\n 2]\n</parameter>\n"
            "<parameter=b>\n<b>\n\n</parameter>\n</function>\n</tool_call>",
            "Go.",
            [("f", {"a": [1, 2], "b": "<b>\n"})],
        ),
        ("qwen3_coder", "<function=f></function><function=g>\n</function>", "", [("f", {}), ("g", {})]),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
        (
            "llama3_json",
            'So <|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "arguments": {}}',
            "So",
            [("f", {}), ("g", {})],
        ),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "x"}]', "", [("f", {"a": 1})]),
        (
            "mistral",
            'Hm.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x[ARGS]{}',
            "Hm.",
            [("f", {"a": 1}), ("g", {})],
        ),
        (
            "deepseek",
            f"Hm.<｜tool▁calls▁begin｜>{V3}\n{V31}<｜tool▁calls▁end｜>",
            "Hm.",
            [("f", {}), ("f", {"a": {"b": "}"}})],
        ),
        (None, ONE, ONE, []),
        ("hermes", f"{ONE[:-13]}{ONE[11:]}", "", [("f", {"a": 1}), ("f", {"a": 1})]),
        ("hermes", '<tool_call>[{"name": "f"}, {"name": "g", "arguments": null}]', "", [("f", {}), ("g", {})]),
        ("hermes", '<tool_call>{"name": "f"},\n{"name": "g"}</tool_call> b', "b", [("f", {}), ("g", {})]),
        ("hermes", '<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [("f", {"a": 1})]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "parameters": {"a": 1}}]', "", [("f", {"a": 1})]),
        (
            "qwen3_coder",
            "<tool_call>\n<function=f>\n</function>\n<function=g>\n</function>\n</tool_call>",
            "",
            [("f", {}), ("g", {})],
        ),
        (
            "llama3_json",
            '<|python_tag|>[{"name": "f", "parameters": null}, {"name": "g", "arguments": ""}]',
            "",
            [("f", {}), ("g", {})],
        ),
        ("mistral", "[TOOL_CALLS]f[ARGS]null", "", [("f", {})]),
        ("deepseek", V3.replace("{}", "null") + V3.replace("{}\n", ""), "", [("f", {}), ("f", {})]),
        ("deepseek", "<｜tool▁call▁begin｜>f<｜tool▁sep｜><｜tool▁call▁end｜>", "", [("f", {})]),
    ],
)
def test_tool_calls_are_removed_from_the_text(name: str | None, text: str, content: str, calls: list[Any]) -> None:
    """In order; the text around them is kept."""
    assert read(name, text) == (content, calls)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": </tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": -1e999}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 1}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f"} and more</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 100_000),
        ("hermes", '<tool_call>{"name": "f"}{"name": ""}</tool_call>'),
        ("hermes", '<tool_call>[{"name": "f"}, 1]</tool_call>'),
        ("hermes", "<tool_call>[]</tool_call>"),
        ("hermes", '<tool_call>{"name": "f", "arguments": false}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "args": {"a": 1}}</tool_call>'),
        ("llama3_json", '<|python_tag|>[{"name": "f", "parameters": {}}, {"a": 1}]'),
        ("llama3_json", "<|python_tag|>[]"),
        ("hermes", "<tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=f>\nwords\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\n1"),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {}} and more'),
        ("llama3_json", '<|python_tag|>{"name": "f"}'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, 1]'),
        ("mistral", "[TOOL_CALLS][]"),
        ("mistral", "[TOOL_CALLS]f[ARGS]1"),
        ("deepseek", f"<｜tool▁calls▁begin｜>{V3.replace('{}', '{')}<｜tool▁calls▁end｜>"),
    ],
)
def test_malformed_tool_call_stays_in_the_text(name: str, text: str) -> None:
    """Unchanged, so that a reward can see it; its markup is kept even if it consists of special tokens."""
    own = ("<|im_end|>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
    special = (*own, *TOOL_PARSERS["deepseek"].markers)
    assert read(name, text + "<|im_end|>", special=special) == (text, [])


def test_json_answer_is_not_a_call_unless_tools_were_offered() -> None:
    """Llama's calls have no markup besides their form."""
    text = '{"name": "f", "parameters": {"a": 1}}'
    assert read("llama3_json", text) == (text, [])
    assert read("llama3_json", text, TOOLS) == ("", [("f", {"a": 1})])


def test_arguments_in_xml_have_the_declared_types() -> None:
    """A string of digits stays a string if the tool declares one."""
    text = "<function=f>" + "".join(f"<parameter={k}>\n{v}\n</parameter>" for k, v in ARGUMENTS.items()) + "</function>"
    assert read("qwen3_coder", text, TOOLS) == ("", [("f", {"s": "12", "n": None, "i": 12, "x": "a b"})])
    assert read("qwen3_coder", text, [TOOLS[0]["function"]])[1] == read("qwen3_coder", text, TOOLS)[1]
    assert read("qwen3_coder", text, [None, {"function": 3}]) == (
        "",
        [("f", {"s": 12, "n": None, "i": 12, "x": "a b"})],
    )


ARGUMENTS = {"s": "12", "n": "null", "i": "12", "x": "a b"}


@pytest.mark.parametrize("arguments", ['""', '" "', "null", '"null"', "{}", '"{}"'])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": %s}</tool_call>'),
        ("hermes_qwen", '<tool_call>{"name": "f", "arguments": %s}</tool_call>'),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": %s}'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": %s}]'),
        ("mistral", "[TOOL_CALLS]f[ARGS]%s"),
        ("deepseek", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>%s<｜tool▁call▁end｜>"),
    ],
)
def test_a_call_without_arguments_has_none_however_the_model_writes_it(name: str, text: str, arguments: str) -> None:
    """As the input side reads them: an empty text and null are `{}`."""
    assert read(name, text % arguments) == ("", [("f", {})])


@pytest.mark.parametrize(
    ("declared", "text", "value"),
    [
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": ["boolean", "null"]}, "False", False),
        ({"type": ("boolean", "null")}, "None", None),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "True", True),
        ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, "None", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "12", "12"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"allOf": [{"type": "boolean"}]}, "True", True),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": ["string", "boolean"]}, "True", "True"),
        ({"type": "boolean"}, "Truely", "Truely"),
        ({"type": "string"}, "None", "None"),
        ({}, "True", "True"),
    ],
)
def test_constants_that_python_writes_have_the_declared_type(declared: Any, text: str, value: object) -> None:
    """Chat templates write true as True, so models do; text that is declared as a string is never changed."""
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": declared}}}}]
    called = f"<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>"
    assert read("qwen3_coder", called, tools) == ("", [("f", {"x": value})])
    tools[0]["function"]["parameters"] = json.dumps(tools[0]["function"]["parameters"])
    assert read("qwen3_coder", called, tools) == ("", [("f", {"x": value})]), "as JSON text, as data sets have it"


XML = "<tool_call>\n<function=g>\n<parameter=n>\n2\n</parameter>\n</function>\n</tool_call>"


def test_one_parser_reads_both_of_twinkles_formats() -> None:
    """JSON and XML, in order, and both malformed ones stay in the text."""
    assert read("hermes_qwen", f"a{XML}b{ONE}c") == ("abc", [("g", {"n": 2}), ("f", {"a": 1})])
    for malformed in (
        "<tool_call>\n<function=f>\nwords\n</function>\n</tool_call>",
        '<tool_call>{"name": 1}</tool_call>',
    ):
        assert read("hermes_qwen", malformed) == (malformed, [])


def test_tool_calls_have_ids_that_differ_within_a_conversation() -> None:
    """Nine alphanumerics, as Mistral's templates require; the model's own id if it writes one."""
    parser = MessageParser(tool_parser="hermes")
    ids = [call["id"] for number in (1, 3) for call in parser.message(ONE + ONE, number=number)["tool_calls"]]
    assert len(set(ids)) == 4 and all(len(made) == 9 and made.isalnum() for made in ids)
    (call,) = MessageParser(tool_parser="mistral").message('[TOOL_CALLS][{"name": "f", "id": "own"}]')["tool_calls"]
    assert call == {"id": "own", "type": "function", "function": {"name": "f", "arguments": {}}}


names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.tuples(names, st.dictionaries(st.text(max_size=8), values, max_size=3)), min_size=1, max_size=3),
    st.text("ab\n", max_size=5),
)
def test_hermes_calls_round_trip_with_any_arguments(calls: list[Any], said: str) -> None:
    """Including markup inside a string."""
    blocks = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    text = said + "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)
    assert read("hermes", text) == (said.strip(), calls)


DEFS: dict[str, Any] = {
    "Flag": {"type": "boolean"},
    "Name": {"type": "string"},
    "Mode": {"enum": ["1", "2"]},
    "a/b": {"$ref": "#/$defs/Name"},
    "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "boolean"}]},
}


@pytest.mark.parametrize(
    ("declared", "text", "value"),
    [
        ({"$ref": "#/$defs/Flag"}, "True", True),
        ({"$ref": "#/$defs/Name"}, "3", "3"),
        ({"$ref": "#/$defs/Mode"}, "1", "1"),
        ({"$ref": "#/$defs/a~1b"}, "3", "3"),
        ({"$ref": "#/$defs/Loop"}, "True", True),
        ({"anyOf": [{"$ref": "#/$defs/Flag"}, {"type": "null"}]}, "None", None),
        ({"allOf": [{"$ref": "#/$defs/Flag"}], "default": True}, "False", False),
        ({"$ref": "#/$defs/None"}, "3", 3),
        ({"$ref": "other.json#/x"}, "3", 3),
        ({"type": "boolean", "nullable": True}, "None", None),
        ({"type": "string", "nullable": True}, "null", None),
        ({"nullable": True, "enum": ["3", "4"]}, "3", "3"),
        ({"type": "boolean", "nullable": False}, "None", "None"),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"enum": [True, False]}, "True", True),
        ({"enum": [True, "auto"]}, "True", True),
        ({"enum": [True, "auto"]}, "auto", "auto"),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["x", None]}, "None", None),
        ({"enum": ["x", None]}, "7", "7"),
        ({"const": "3"}, "3", "3"),
        ({"anyOf": [{"type": "integer"}, {"const": "3"}]}, "3", "3"),
        ({"type": "str"}, "3", "3"),
        ({"type": "bool"}, "True", True),
        (None, "True", "True"),
    ],
)
def test_types_are_declared_in_other_ways_too(declared: Any, text: str, value: object) -> None:
    """They may be in a `$ref`, `nullable`, the listed values alone, or written with Python's names."""
    call = f"<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>"
    whole: dict[str, Any] = {"properties": {"x": declared}, "$defs": DEFS}
    referred = {"$ref": "#/$defs/All", "$defs": {**DEFS, "All": {"properties": {"x": declared}}}}
    for parameters in (whole, json.dumps(whole), referred, {"additionalProperties": declared, "$defs": DEFS}):
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        for name in ("qwen3_coder", "hermes_qwen"):
            ((_, arguments),) = read(name, call, tools)[1]
            assert arguments == {"x": value} and type(arguments["x"]) is type(value)


@given(
    st.sampled_from(sorted(TOOL_PARSERS)),
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                '{"name": "f", "arguments": {}}',
                "{",
                "}",
                "[",
                "]",
                "<function=f>",
                "</function>",
                "<parameter=a>",
                "</parameter>",
                "[TOOL_CALLS]",
                "[ARGS]",
                "f",
                " ",
                "\n",
                ";",
                "<|python_tag|>",
                "```",
                *TOOL_PARSERS["deepseek"].markers,
            ]
        )
    ),
)
def test_text_without_a_call_is_unchanged(name: str, parts: list[str]) -> None:
    """And no parser fails, whatever a model writes."""
    text = "".join(parts)
    content, calls = read(name, text, TOOLS)
    assert calls or content == text


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\n4", "Hm.", "4"),
        ("\n<think>Hm.", "Hm.", ""),
        ("<think>\n\n</think>\n\n4", None, "4"),
        ("4", None, "4"),
        ("I say <think>x</think>", None, "I say <think>x</think>"),
        ("Hm.</think>4", None, "Hm.</think>4"),
    ],
)
def test_reasoning_is_the_text_in_tags_at_the_start(text: str, reasoning: str | None, content: str) -> None:
    """Truncated or not; reasoning is parsed before special tokens are removed, as its tags may be some."""
    for special in ((), ("<think>", "</think>", "<|im_end|>")):
        message = MessageParser(reasoning=THINK, special_tokens=special).message(text)
        assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
    assert MessageParser().message(text) == {"role": "assistant", "content": text}


def test_tool_call_inside_reasoning_is_ignored() -> None:
    """Only the text after the reasoning is parsed."""
    parser = MessageParser(reasoning=THINK, tool_parser="hermes")
    assert "tool_calls" not in parser.message(f"<think>{ONE}")
    message = parser.message(f"<think>{ONE}</think>{ONE}")
    assert len(message["tool_calls"]) == 1 and message["reasoning_content"] == ONE and message["content"] == ""


def test_special_tokens_are_removed_longest_first() -> None:
    """One may be a prefix of another."""
    assert read(None, "a<|e|>b<|e|><|e|>x>", special=("<|e|>", "<|e|>x>")) == ("ab", [])


def _bang(text: str, tools: Any) -> tuple[str, list[ToolCall]]:
    return text.replace("!", ""), [ToolCall("bang", {})] * text.count("!")


BANG = ToolParser(parse=_bang, markers=("!",))


def test_tool_parser_can_be_registered_or_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name must be registered where messages are parsed; a registered name cannot be replaced."""
    monkeypatch.setattr("twinkle_serve.data_format.tool_calls.TOOL_PARSERS", table := dict(TOOL_PARSERS))
    register_tool_parser("bang", BANG)
    register_tool_parser("bang", BANG)
    assert read("bang", "a!!") == ("a", [("bang", {})] * 2)
    with pytest.raises(TemplateError, match="'hermes' is registered already"):
        register_tool_parser("hermes", BANG)
    carried = pickle.loads(pickle.dumps(MessageParser(tool_parser=BANG)))
    del table["bang"]
    assert carried.message("!")["tool_calls"]
    with pytest.raises(TemplateError, match="unknown tool parser 'bang'"):
        read("bang", "!")
