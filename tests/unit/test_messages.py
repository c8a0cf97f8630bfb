"""Content of messages: text of any kind reaches the model as it is, anything else is refused by name."""

from __future__ import annotations

import enum
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chat_templates import QWEN3
from tests.support.messages import CALL, CALLED, USER, template_of, text_of
from tests.support.turns import prompt_of
from twinkle_serve import hub
from twinkle_serve.errors import PromptError
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import encode_inputs

OBJECTS = """{%- for m in messages %}
    {%- if m.role == 'tool' and m.content is mapping %}{{- m.content | tojson }}
    {%- elif m.role == 'tool' %}{{- m.content | tojson }}{% else %}{{- m.content }}{% endif %}
    {%- for c in m.tool_calls or [] %}{{- c.function.arguments | tojson }}{% endfor %}
{%- endfor %}"""
"""Writes results as JSON itself, text too, as Llama's templates do."""
ITERATED = """{%- for m in messages %}{% for part in m.content %}{{- part }}{% endfor %}
    {%- for c in m.tool_calls or [] %}{{- c.function.arguments | tojson }}{% endfor %}
{%- endfor %}"""
"""Of a dict it would write the keys only."""


@pytest.fixture(scope="module")
def demo() -> Template:
    return Template(hub.DEMO)


class Word(enum.StrEnum):
    HI = "hi"


@pytest.mark.parametrize(
    "content",
    [
        "hi",
        np.str_("hi"),
        Word.HI,
        ["h", "i"],
        ("h", {"type": "text", "text": "i"}),
        [{"type": None, "text": "hi", "image": None, "audio": {"path": None}}],
        np.array([{"type": "text", "text": "hi"}]),
        deque(["hi"]),
    ],
)
def test_text_of_any_kind_is_content(content: Any, demo: Template) -> None:
    """As one string, whatever library it comes from."""
    assert text_of(demo, [{"role": np.str_("user"), "content": content}]) == text_of(demo, [USER])


NOT_TEXT = [None, 3, 1.5, True, {"a": 1}, {"type": "text", "text": "hi"}, b"hi", float("nan"), {"hi"}, object]


@pytest.mark.parametrize("content", NOT_TEXT)
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_content_that_is_not_text_is_refused(content: Any, role: str, demo: Template) -> None:
    """A chat template would write it as None, nan or b'…', or as nothing."""
    with pytest.raises(PromptError) as caught:
        encode_inputs([{"messages": [USER]}, {"messages": [USER, {"role": role, "content": content}, USER]}], demo)
    message = str(caught.value)
    assert f"inputs[1].messages[1].content of a message with role '{role}' must be text" in message
    assert f"({type(content).__name__})" in message


@pytest.mark.parametrize("part", [None, 3, {"type": "text"}, {"type": "text", "text": b"x"}, ["hi"]])
def test_part_that_is_not_text_is_refused(part: Any, demo: Template) -> None:
    """With its position."""
    with pytest.raises(PromptError, match=r'messages\[0\].content\[1\] must be {"type": "text", "text": …}'):
        text_of(demo, [{"role": "user", "content": ["hi", part]}])


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({**USER, "audios": ["x.wav"]}, "messages[0].audios"),
        ({**USER, "video": "x.mp4"}, "messages[0].video"),
        ({"role": "user", "content": [{"type": "audio", "audio": "x"}]}, "content[0] is of type 'audio'"),
        ({"role": "user", "content": [{"type": "text", "text": "hi", "image": "x"}]}, "content[0].image"),
    ],
)
def test_message_with_images_videos_or_audio_is_refused(message: Any, where: str, demo: Template) -> None:
    """Also where text comes with it."""
    with pytest.raises(PromptError, match="this service samples from text only") as caught:
        text_of(demo, [message])
    assert where in str(caught.value)


def test_content_may_be_none_only_beside_tool_calls(demo: Template) -> None:
    """As OpenAI's format has it; a message may leave it out then."""
    result = {"role": "tool", "content": "2"}
    without = {key: value for key, value in CALLED.items() if key != "content"}
    expected = text_of(demo, [USER, CALLED, result])
    assert text_of(demo, [USER, {**CALLED, "content": None}, result]) == expected
    assert text_of(demo, [USER, without, result]) == expected
    others: list[Any] = [{"role": "assistant"}, {"role": "assistant", "content": None, "tool_calls": []}]
    for other in others:
        with pytest.raises(PromptError, match="It may be None beside tool_calls only"):
            text_of(demo, [USER, other, USER])
    with pytest.raises(PromptError, match=r"messages\[0\].content of a message with role 'user'"):
        text_of(demo, [{"role": "user", "content": None, "tool_calls": [CALL]}])


@pytest.mark.parametrize("value", [3, ["Hm."], {"text": "Hm."}, b"Hm."])
@pytest.mark.parametrize("key", ["reasoning_content", "name", "tool_call_id"])
def test_other_texts_of_a_message_are_text_too(key: str, value: Any, demo: Template) -> None:
    """Templates that test for a string would leave them out; None is absent."""
    with pytest.raises(PromptError, match=rf"inputs\[0\].messages\[0\].{key} must be text, got "):
        text_of(demo, [{**USER, key: value}])
    assert text_of(demo, [{**USER, key: None}]) == text_of(demo, [USER])


@pytest.mark.parametrize("source", [QWEN3, OBJECTS, ITERATED])
def test_result_that_is_an_object_is_written_as_json(source: str, tmp_path: Path) -> None:
    """Once: by the template, or before it; never as the repr of a dict."""
    template = template_of(tmp_path, source)
    result = {"role": "tool", "content": {"sum": np.int64(3), "ok": True, "of": ["ä", None]}}
    text = text_of(template, [USER, CALLED, result])
    assert '{"sum": 3, "ok": true, "of": ["ä", null]}' in text


NOT_JSON = [float("nan"), np.float32("inf"), [-float("inf")], {"b": [float("nan")]}, b"x", object(), {1}]


@pytest.mark.parametrize("value", NOT_JSON, ids=type)
def test_values_that_json_does_not_have_are_refused(value: Any, demo: Template, tmp_path: Path) -> None:
    """Results, arguments and schemas are checked, because Python writes NaN into JSON."""
    said = [USER, {**CALLED, "tool_calls": [{"function": {"name": "add", "arguments": {"a": value}}}]}]
    for template in (demo, template_of(tmp_path, OBJECTS)):
        for where, messages, tools in (
            (r"messages\[2\].content has", [USER, CALLED, {"role": "tool", "content": {"a": value}}], None),
            (r"messages\[1\].tool_calls\[0\]: its arguments have", [*said, USER], None),
            (r"tools\[0\] has", [USER], [{"name": "add", "parameters": {"properties": {"a": {"default": value}}}}]),
        ):
            with pytest.raises(PromptError, match=rf"inputs\[0\].{where} the (number|value) .*, which JSON does not"):
                text_of(template, messages, tools)


@pytest.mark.parametrize("arguments", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}'])
def test_arguments_in_text_are_json_too(arguments: str, demo: Template) -> None:
    """Python's parser accepts NaN and infinities, which JSON does not have."""
    call = {"function": {"name": "add", "arguments": arguments}}
    with pytest.raises(PromptError, match=r"its arguments have the number (nan|-inf|inf), which JSON does not have"):
        text_of(demo, [USER, {**CALLED, "tool_calls": [call]}, USER])


def test_nan_is_an_absent_key_of_a_message_and_of_a_call(demo: Template) -> None:
    """Columnar files write NaN for missing keys. In arguments it is refused."""
    nan = float("nan")
    call = {**CALL, "index": nan, "id": nan}
    messages = [
        {**USER, "name": nan, "tool_calls": nan},
        {**CALLED, "tool_calls": [call], "reasoning_content": nan},
        USER,
    ]
    assert text_of(demo, messages) == text_of(demo, [USER, CALLED, USER])


KEYS: list[dict[Any, int]] = [{1: 2, "a": 3}, {None: 1}, {(1, 2): 3}, {1: 2}]


@pytest.mark.parametrize("keys", KEYS)
def test_results_and_tools_with_keys_that_are_not_text_are_refused(keys: dict[Any, int], demo: Template) -> None:
    """JSON would have other keys, or none."""
    with pytest.raises(PromptError, match=r"messages\[2\].content has the key .*, and JSON's keys are strings"):
        text_of(demo, [USER, CALLED, {"role": "tool", "content": {"of": [keys]}}])
    with pytest.raises(PromptError, match=r"tools\[0\] has the key .*, and JSON's keys are strings"):
        text_of(demo, [USER], [{"name": "add", "parameters": {"properties": keys}}])


def test_result_that_is_a_list_is_refused_with_its_remedy(demo: Template) -> None:
    """It may be a list of parts or of results; the error shows the first that is no part."""
    with pytest.raises(PromptError, match=r"got \{'id': 1\} \(dict\). Write a list of results as text"):
        text_of(demo, [USER, CALLED, {"role": "tool", "content": [{"id": 1}]}])


@pytest.mark.parametrize("content", [None, 3, True, [{"a": 1}], [1, 2], {"type": "text", "text": "3"}])
def test_other_results_are_refused(content: Any, demo: Template) -> None:
    """They could mean several texts."""
    with pytest.raises(PromptError, match=r"messages\[2\].content"):
        text_of(demo, [USER, CALLED, {"role": "tool", "content": content}])


def test_calls_in_the_form_before_tool_calls_are_refused(demo: Template) -> None:
    """Chat templates leave them out."""
    old = {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": "{}"}}
    with pytest.raises(PromptError, match=r"messages\[1\].function_call would be left out.* Write it as tool_calls"):
        text_of(demo, [USER, old, USER])
    assert text_of(demo, [USER, {**CALLED, "function_call": None}, USER]) == text_of(demo, [USER, CALLED, USER])


def test_reasoning_has_two_names(tmp_path: Path) -> None:
    """vLLM's servers return it as `reasoning`, and chat templates read `reasoning_content`."""
    template = template_of(tmp_path, QWEN3)
    written = text_of(template, [USER, {**CALLED, "reasoning_content": "Hm."}, {"role": "tool", "content": "2"}])
    assert "Hm." in written
    named = {**CALLED, "reasoning": "Hm.", "reasoning_content": None}
    assert text_of(template, [USER, named, {"role": "tool", "content": "2"}]) == written


def test_one_message_instead_of_a_list_is_refused(demo: Template) -> None:
    """It is no trajectory in itself."""
    for item in ({"messages": USER}, {"input_ids": [5], "messages": USER}):
        with pytest.raises(PromptError, match=r"messages must be a list of at least one message, got \{'role'"):
            prompt_of(item, demo)
