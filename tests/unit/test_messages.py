"""Messages of an input: every one reaches the model as it is, or is refused by name."""

from __future__ import annotations

import copy
import enum
import json
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chat_templates import LLAMA3, OPENED, QWEN3, model_with
from tests.support.columnar import columnar
from tests.support.turns import after, feature_of, prompt_of
from twinkle_serve import hub
from twinkle_serve.errors import PromptError
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import encode_inputs

USER: dict[str, Any] = {"role": "user", "content": "hi"}
CALL = {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}

BY_ROLE = """{%- for m in messages %}
    {%- if m.role == 'system' and loop.first %}{{- '[' + m.content + ']' }}
    {%- elif m.role == 'user' %}{{- 'U:' + m.content }}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {{- 'A:' + m.content + m.tool_calls[0].function.arguments | tojson }}
    {%- elif m.role == 'assistant' %}{{- 'A:' + m.content }}{% endif %}
{%- endfor %}"""
"""Reads known roles only, the first system message, and the first of several calls; no tools' results."""
MERGED = """{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role == 'user' %}{{- first + '|' + m.content }}{% endfor %}"""
"""The system prompt is part of the user's message, and other roles are ignored."""
CALLS_ONLY = """{%- for m in messages %}
    {%- if m.tool_calls %}{% for c in m.tool_calls %}{{- c.function.arguments | tojson }}{% endfor %}
    {%- else %}{{- m.role + ':' + m.content }}{% endif %}
{%- endfor %}"""
"""The text beside calls is not written, as Mistral's and Llama's templates do."""
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


def template_of(folder: Path, source: str, **options: Any) -> Template:
    return Template(model_with(folder, source), **options)


def text_of(template: Template, messages: Any, tools: Any = None) -> str:
    return template.decode(prompt_of({"messages": messages, "tools": tools}, template).ids)


# -- content -------------------------------------------------------------------------------------


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


# -- messages that a chat template does not read ----------------------------------------------------


UNREAD = "the model's chat template does not read"


def said(role: str, content: str = "and more") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("source", "messages", "error"),
    [
        (
            BY_ROLE,
            [said("usr")],
            "messages[0]: the model's chat template leaves the content of a message with role 'usr'",
        ),
        (BY_ROLE, [USER, said("developer"), USER], "messages[1]: the model's"),
        (BY_ROLE, [USER, said("function")], "messages[1]: the model's"),
        (BY_ROLE, [USER, said("system"), USER], "messages[1]: the model's"),
        (BY_ROLE, [said("system"), said("system"), USER], "messages[1]: the model's"),
        (BY_ROLE, [USER, CALLED, said("tool")], "messages[2]: the model's chat template leaves the content"),
        (
            BY_ROLE,
            [USER, {**CALLED, "tool_calls": [CALL, CALL]}, USER],
            "messages[1].tool_calls: the model's chat template does not read all",
        ),
        (
            BY_ROLE,
            [{**USER, "tool_calls": [CALL]}],
            "messages[0].tool_calls: the model's chat template does not read them",
        ),
        (CALLS_ONLY, [USER, {**CALLED, "content": "So:"}, USER], "role 'assistant' beside tool_calls out"),
        (MERGED, [said("system")], "messages[0]: the model's"),
        (MERGED, [USER, said("assistant"), USER], "messages[1]: the model's"),
        (MERGED, [USER, said("system")], "messages[1]: the model's"),
        (OPENED, [USER, CALLED, USER], f"messages[1].tool_calls: {UNREAD} them"),
    ],
)
def test_message_that_leaves_no_trace_is_refused(source: str, messages: Any, error: str, tmp_path: Path) -> None:
    """Also after the template has written the same role elsewhere; again each time that it is sent."""
    template = template_of(tmp_path, source)
    assert text_of(template, [said("system"), USER]) and text_of(template, [USER])
    for _ in range(2):
        with pytest.raises(PromptError) as caught:
            text_of(template, messages)
        assert error in str(caught.value) and "inputs[0]" in str(caught.value)


def test_result_that_answers_no_call_is_refused_if_the_template_writes_only_answers(tmp_path: Path) -> None:
    """Whatever was written before: the result depends on the message that it follows."""
    source = """{%- set ns = namespace(called=false) %}
    {%- for m in messages %}{% if m.role != 'tool' or ns.called %}{{- m.content }}{% endif %}
        {%- for c in m.tool_calls or [] %}{{- c.function.arguments | tojson }}{% endfor %}
        {%- if m.role == 'assistant' %}{% set ns.called = m.tool_calls is defined %}{% endif %}
    {%- endfor %}"""
    template = template_of(tmp_path, source)
    answered = [USER, CALLED, said("tool"), said("tool", "2")]
    assert text_of(template, answered) and text_of(template, answered[:3])
    for results in (answered[2:], answered[2:3]):
        with pytest.raises(PromptError, match=r"messages\[2\]: the model's chat template leaves the content"):
            text_of(template, [USER, said("assistant"), *results])
    sampled = feature_of(prompt_of({"messages": [USER]}, template), template, "2<|im_end|>")
    with pytest.raises(PromptError, match=r"It follows a sampled message here\. Pass"):
        prompt_of(after(sampled, said("tool")), template)


def test_unknown_role_is_refused_where_the_demo_template_ignores_it(demo: Template) -> None:
    """At the beginning of a conversation; elsewhere it is written."""
    for messages in ([said("usr")], [said("developer"), USER]):
        with pytest.raises(PromptError, match=r"messages\[0\]: the model's chat template leaves"):
            text_of(demo, messages)
    assert "<|im_start|>developer\nand more<|im_end|>" in text_of(demo, [USER, said("developer")])


def test_system_prompt_of_a_template_is_refused_if_the_chat_template_ignores_it(tmp_path: Path) -> None:
    """The message says which one is meant."""
    template = template_of(
        tmp_path, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", system="s"
    )
    with pytest.raises(PromptError, match=r"inputs\[0\]: the template's system prompt: the model's"):
        text_of(template, [USER])


def test_tools_are_refused_if_the_chat_template_only_tests_for_them(tmp_path: Path) -> None:
    """Its source reads the name, and no tool is in the text."""
    template = template_of(tmp_path, "{% if tools %}{% endif %}{{ messages[0].content }}")
    with pytest.raises(PromptError, match="the model's chat template does not read tools here"):
        text_of(template, [USER], [{"type": "function", "function": {"name": "add"}}])


@pytest.mark.parametrize("source", [QWEN3, LLAMA3.replace("{{- bos_token }}", ""), OPENED])
def test_a_form_of_conversation_is_rendered_once_more_and_never_again(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt costs one render, whatever its texts."""
    template = template_of(tmp_path, source)
    renders = 0
    render = template._apply

    def counted(*arguments: Any) -> str:
        nonlocal renders
        renders += 1
        return render(*arguments)

    monkeypatch.setattr(template, "_apply", counted)
    conversations = [[said("system", f"s{i}"), said("user", f"u{i}")] for i in range(20)]
    encode_inputs([{"messages": messages} for messages in conversations], template)
    assert renders == 21
    longer = [
        [*messages, said("assistant"), said("user"), said("assistant"), said("user")] for messages in conversations
    ]
    encode_inputs([{"messages": messages} for messages in longer], template)
    assert renders == 42


def test_override_of_render_decides_itself(tmp_path: Path) -> None:
    """It gets text, and its text is not compared with the messages."""

    class Short(Template):
        def render(self, messages: Any, tools: Any, *, generation_prompt: bool = True) -> str:
            assert all(isinstance(message["content"], str) for message in messages)
            return str(messages[-1]["content"])

    short = Short(model_with(tmp_path, OPENED))
    assert text_of(short, [said("usr"), said("tool", {"a": 1})]) == '{"a": 1}'  # type: ignore[arg-type]


# -- rows of data sets ---------------------------------------------------------------------------

NAMED = {"a": {"type": "integer", "default": 0}, "b": {"type": "string", "enum": ["x", None]}}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": NAMED}}},
    {
        "type": "function",
        "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}, "strict": True},
    },
]
CALL_OF_STOP = {"id": "y", "function": {"name": "stop", "arguments": {}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    USER,
    {
        "role": "assistant",
        "content": "So:",
        "tool_calls": [CALL, CALL_OF_STOP],
    },
    {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"},
]


def test_row_of_a_columnar_file_is_rendered_as_what_was_written(tmp_path: Path) -> None:
    """Arrays, and nulls in the keys of other rows, change nothing: in messages, calls and tools."""
    template = template_of(tmp_path, QWEN3)
    before = columnar(row := {"messages": CONVERSATION, "tools": TOOLS})
    assert before["messages"][0]["tool_calls"] is None and before["messages"][2]["tool_calls"][1]["type"] is None
    assert before["messages"][2]["tool_calls"][1]["function"]["arguments"] == {"a": None}
    assert before["tools"][1]["function"]["parameters"]["properties"] == {"a": None, "b": None}
    assert prompt_of(before, template).ids.tolist() == prompt_of(row, template).ids.tolist()
    feature = feature_of(prompt_of(before, template), template, "3<|im_end|>")
    assert feature["messages"][-1] == {"role": "assistant", "content": "3"}


EMPTY: list[Any] = [None, "", [], (), {}, np.array([]), np.array([], object)]
NULLS: list[Any] = [float("nan"), np.float32("nan"), [None], np.array([None, None]), {"bytes": None, "path": None}]


@pytest.mark.parametrize("absent", [*EMPTY, *NULLS])
def test_none_and_empty_values_are_absent(absent: Any, demo: Template) -> None:
    """In trajectories, features, messages and calls; nothing else of the input changes."""
    keys = ["tools", "images", "videos", "audios", "prompt", "input_ids", "labels", "attention_mask", "reward"]
    row = {"messages": [{**USER, "tool_calls": absent, "images": absent}], **dict.fromkeys(keys, absent)}
    assert text_of(demo, [USER]) == demo.decode(prompt_of(row, demo).ids)
    ids = prompt_of(row, demo).ids
    keys = ["tools", "labels", "attention_mask", "position_ids", "token_type_ids", "messages", "encoded", "audios"]
    feature = feature_of(prompt_of({**dict.fromkeys(keys, absent), "input_ids": ids}, demo), demo, "2")
    assert feature["input_ids"][:-1] == ids.tolist() and len(feature["position_ids"]) == len(ids) + 1
    assert "token_type_ids" not in feature and "encoded" not in feature


def test_nulls_with_a_meaning_stay(tmp_path: Path) -> None:
    """A null default that the schema allows, items of lists, and null arguments unless a tool does not allow them."""
    template = template_of(tmp_path, QWEN3)
    optional = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    parameters = {"type": "object", "properties": {"a": optional, "default": {"const": None}, "c": {"enum": [1, None]}}}
    tools: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    assert json.dumps(parameters) in text_of(template, [USER], tools)
    call = {"name": "add", "arguments": {"a": None, "c": 1, "d": None}}
    called = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER]
    assert '"arguments": {"a": null, "c": 1, "d": null}' in text_of(template, called)
    assert '"arguments": {"a": null, "c": 1}' in text_of(template, called, tools)
    defs = {"Maybe": {"type": "string", "nullable": True}, "Name": {"type": "string"}}
    referred = {"a": {"$ref": "#/$defs/Maybe"}, "c": {"enum": [1]}, "d": {"$ref": "#/$defs/Name"}}
    inner = {"$defs": {**defs, "All": {"properties": referred}}, "$ref": "#/$defs/All"}
    for schema in ({"properties": referred, "$defs": defs}, inner):
        tool: Any = {"type": "function", "function": {"name": "add", "parameters": schema}}
        assert '"arguments": {"a": null, "c": 1}' in text_of(template, called, [tool])
    call["arguments"] = json.dumps(call["arguments"])
    assert '"arguments": {"a": null, "c": 1, "d": null}' in text_of(template, called, tools)


@pytest.mark.parametrize("arguments", [None, "", " ", "null", {}, "{}"])
def test_call_without_arguments_has_none(arguments: Any, demo: Template) -> None:
    """However a caller writes it."""
    call = {"id": None, "function": {"name": "f", "arguments": arguments}, "name": None, "arguments": None}
    message = {"role": "assistant", "content": None, "tool_calls": np.array([call])}
    assert '{"name": "f", "arguments": {}}' in text_of(demo, [USER, message, USER])


@pytest.mark.parametrize("messages", [tuple, deque, np.array, lambda m: np.array(m, object)])
def test_any_sequence_is_a_list_of_messages(messages: Any, demo: Template) -> None:
    """And stays as it is."""
    given = messages([USER, said("assistant"), USER])
    before = copy.deepcopy(given)
    assert text_of(demo, given) == text_of(demo, [USER, said("assistant"), USER])
    assert list(before) == list(given)


class Arrow:
    """A scalar of Arrow, by the one method that is used of it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def as_py(self) -> Any:
        return self._value


def test_scalars_of_arrow_are_their_values(demo: Template) -> None:
    """A table's row has them where nothing converts it."""
    row = {"messages": Arrow([USER]), "tools": Arrow(None), "images": Arrow([])}
    assert demo.decode(prompt_of(row, demo).ids) == text_of(demo, [USER])
    feature = feature_of(prompt_of(row, demo), demo, "2")
    assert feature["messages"] == [USER, said("assistant", "2")]


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ({"type": "function"}, "must be a list"),
        ("[]", "must be a list"),
        ([3], r"tools\[0\] must be a dict, got 3"),
        ([{}, None], r"tools\[1\]"),
    ],
)
def test_tools_that_are_no_dicts_are_refused(tools: Any, error: str, demo: Template) -> None:
    """With their position."""
    with pytest.raises(PromptError, match=error):
        text_of(demo, [USER], tools)


def test_messages_and_tools_that_contain_themselves_are_refused(demo: Template) -> None:
    """They have no end; other keys of a feature may."""
    endless: dict[str, Any] = {}
    endless["more"] = endless
    for item in ({"messages": [{**USER, "notes": endless}]}, {"messages": [USER], "tools": [endless]}):
        with pytest.raises(PromptError, match=r"inputs\[0\].(messages|tools)\[0\] is nested too deeply"):
            prompt_of(item, demo)
    assert prompt_of({"input_ids": [5], "notes": endless, "user_data": endless}, demo)
