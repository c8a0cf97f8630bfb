"""Messages from text that arrives in parts."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.message_parts import cut, joined, push_all
from twinkle_serve.data_format.message_stream import (
    ContentDelta,
    MessageDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallBegin,
)
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.data_format.tool_calls import TOOL_PARSERS, ToolCall, ToolParser

THINK = ("<think>", "</think>")
SPECIAL = ("<|im_end|>", "<|im_end|>x", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}]
HERMES = '<tool_call>\n{"name": "f", "arguments": {"n": 1, "é": "<tool_call>\\n😀"}}\n</tool_call>'
XML = "<tool_call>\n<function=f>\n<parameter=n>\n2\n</parameter>\n</function>\n</tool_call>"
CALLS = {
    "hermes": [HERMES, '<tool_call>[{"name": "f"}, {"name": "g", "arguments": "{\\"a\\": 1}"}]', "<tool_call>{]"],
    "qwen3_coder": [XML, "<function=g></function>", "<tool_call> <function=f>", "<function=f>no</function>"],
    "hermes_qwen": [HERMES, XML],
    "mistral": [
        '[TOOL_CALLS][{"name": "f", "arguments": {"n": 1}}]',
        "[TOOL_CALLS]f[CALL_ID]x[ARGS]{}",
        "[TOOL_CALLS]",
    ],
    "llama3_json": ['<|python_tag|>{"name": "f", "parameters": {"n": 1}}', '{"name": "f", "parameters": {}}; '],
    "deepseek": [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>",
    ],
}
FRAGMENTS = [
    "<",
    "<tool",
    "_call>",
    "</",
    "<function",
    "=f>",
    "[TOOL",
    "{",
    "}",
    '"',
    "\\",
    "[",
    "]",
    ":",
    ",",
    "null",
    ";",
]
PLAIN = [
    "Hi",
    " ",
    "\n",
    "\n\n",
    "é",
    "😀",
    "<think>",
    "</think>",
    "<|im_end|>",
    "<|im_end|>x",
    "<|im_",
    "1e999",
    "NaN",
]


@st.composite
def samples(draw: st.DrawFn) -> tuple[str, str]:
    name = draw(st.sampled_from(sorted(CALLS)))
    opening = draw(st.sampled_from(["", "<think>", "\n<think>\n"]))
    parts = draw(st.lists(st.sampled_from([*CALLS[name] * 3, *FRAGMENTS, *PLAIN]), max_size=10))
    text = opening + "".join(parts)
    return name, text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


@given(samples(), st.integers(0, 2**32), st.booleans())
@example(("hermes", HERMES + "<|im_end|>"), 0, True)
@example(("hermes", "<think>\n\nx\n</think>\n\n Hi" + HERMES + " \n" + HERMES + "\n"), 1, True)
def test_deltas_joined_are_the_message_however_the_text_is_cut(
    sample: tuple[str, str], seed: int, offered: bool
) -> None:
    """For texts with calls, with reasoning, with broken or truncated markup."""
    name, text = sample
    parser = MessageParser(tool_parser=name, reasoning=THINK, special_tokens=SPECIAL)
    tools = TOOLS if offered else []
    stream = parser.stream(tools, number=3)
    whole = parser.parse(text, tools, number=3)
    assert joined(push_all(stream, cut(text, seed))) == whole == stream.parsed()
    assert parser.message(text, tools, number=3) == whole.message()


@pytest.mark.parametrize(("name", "text"), [(name, "".join(calls)) for name, calls in CALLS.items()])
def test_one_character_at_a_time_gives_the_same_message(name: str, text: str) -> None:
    """Several calls, one after the other."""
    parser = MessageParser(tool_parser=name)
    message = joined(push_all(parser.stream(TOOLS), list(text)))
    assert message == parser.parse(text, TOOLS)
    assert message.calls


def released(parser: MessageParser, parts: list[str]) -> list[list[MessageDelta]]:
    stream = parser.stream()
    return [stream.push(part) for part in parts]


def test_text_is_released_as_it_comes() -> None:
    """Only what may be markup is held back, and space that a message with calls would not contain."""
    parser = MessageParser(tool_parser="hermes", reasoning=THINK)
    assert released(parser, ["<thi", "nk>\n", "Hm", ". <", "b", "\n", "</thi", "nk>\n", "\nA", " <tool", "s>"]) == [
        [],
        [],
        [ReasoningDelta("Hm")],
        [ReasoningDelta(". ")],
        [ReasoningDelta("<b")],
        [],
        [],
        [],
        [ContentDelta("A")],
        [],
        [ContentDelta(" <tools>")],
    ]


def test_call_is_released_when_it_is_complete() -> None:
    """Not at the end of the sample alone; text that cannot become a call is released at once."""
    parser = MessageParser(tool_parser="hermes")
    assert released(parser, ["<tool_call>", '{"name": "f"}', "</tool_call>", "\n"])[2] == [
        ToolCallBegin(0, "call00000", "f"),
        ToolCallArguments(0, "{}"),
    ]
    assert released(parser, ["<tool_call>", "{not"])[1] == []
    assert released(parser, ["<tool_call>", "{<b>"])[1] == [ContentDelta("<tool_call>{<b>")]
    assert released(parser, ["<tool_call>", "what "])[1] == [ContentDelta("<tool_call>what")]


def test_opening_of_the_turn_is_part_of_the_message() -> None:
    """A prompt may end with the tag that opens the reasoning."""
    parser = MessageParser(reasoning=THINK)
    stream = parser.stream(opening="<think>\n")
    assert [stream.push("Hm"), stream.push(".</think>4", last=True)] == [
        [ReasoningDelta("Hm")],
        [ReasoningDelta("."), ContentDelta("4")],
    ]
    assert stream.parsed() == parser.parse("<think>\nHm.</think>4")


@pytest.mark.parametrize(
    ("name", "text", "written"),
    [
        ("hermes", '<tool_call>{"arguments": {"b":1,  "a" :2.50}, "name": "f"}</tool_call>', '{"b":1,  "a" :2.50}'),
        ("hermes", '<tool_call>[{"name": "f", "arguments": {"a": 1e2}}]', '{"a": 1e2}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\":  1}"}', '{"a":  1}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "é\\u00e9"}}', '{"a": "é\\u00e9"}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}', '{"a": "x\\ny"}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}', "{}"),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a":1}}', '{"a":1}'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a":1 }', '{"a":1 }'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a":1 }}]', '{"a":1 }'),
        ("deepseek", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{ }<｜tool▁call▁end｜>", "{ }"),
        ("qwen3_coder", "<function=f><parameter=s>\né\n</parameter></function>", '{"s": "é"}'),
    ],
)
def test_arguments_are_the_text_that_the_model_wrote(name: str, text: str, written: str) -> None:
    """Unless it is not JSON: models write line breaks into strings, and some formats are no JSON."""
    (call,) = MessageParser(tool_parser=name).parse(text).calls
    assert call.text == written
    assert json.loads(call.text) == call.arguments


def test_arguments_can_be_sent_whatever_they_contain() -> None:
    """Half a surrogate pair, which no UTF-8 has, stays an escape."""
    text = '<tool_call>{"name": "f", "arguments": {"a": "\\ud800", "b": "x\ny"}}</tool_call>'
    (call,) = MessageParser(tool_parser="hermes").parse(text).calls
    call.text.encode()
    assert json.loads(call.text) == call.arguments == {"a": "\ud800", "b": "x\ny"}


def _shout(text: str, tools: Any) -> tuple[str, list[ToolCall]]:
    return text.replace("!", ""), [ToolCall("shout", {})] * text.count("!")


def test_parser_without_a_stream_gets_the_complete_text() -> None:
    """One that a caller registered: its text is held back to the end."""
    parser = MessageParser(tool_parser=ToolParser(parse=_shout, markers=()))
    stream = parser.stream()
    assert stream.push(" He") == stream.push("y! ") == []
    assert joined(stream.push("", last=True)) == parser.parse(" Hey! ")
    assert parser.message(" Hey! ")["content"] == "Hey"
    assert parser.message(" Hey ")["content"] == " Hey "


def test_stream_that_has_ended_takes_no_text() -> None:
    """A sample ends once."""
    stream = MessageParser().stream()
    stream.push("a", last=True)
    with pytest.raises(ValueError, match="ends a message stream"):
        stream.push("b")


LONG = {
    "content": "a < b " * 10_000,
    "reasoning": "<think>" + "so <b " * 10_000,
    "arguments": '<tool_call>{"name": "f", "arguments": {"a": "' + "x\\n<tool" * 10_000 + '"}}</tool_call>',
    "deep": '<tool_call>{"name": "f", "arguments": ' + '{"a": [1, ' * 10_000,
    "xml": "<function=f><parameter=a>" + "x < y " * 10_000 + "</parameter></function>",
    "calls": HERMES * 800,
    "unclosed": "<tool_call>" * 6_000,
}


@pytest.mark.parametrize("kind", sorted(LONG))
def test_time_is_linear_in_the_length(kind: str) -> None:
    """A sample of 60 kB in parts of a few characters takes a fraction of a second, not minutes."""
    text = LONG[kind]
    parts = [text[at : at + 6] for at in range(0, len(text), 6)]
    stream = MessageParser(tool_parser="hermes_qwen", reasoning=THINK, special_tokens=SPECIAL[:2]).stream()
    start = time.process_time()
    push_all(stream, parts)
    assert time.process_time() - start < 5


def test_registered_parsers_all_stream() -> None:
    """None of them holds back a whole sample."""
    assert all(parser.stream is not None for parser in TOOL_PARSERS.values())
