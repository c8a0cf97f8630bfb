"""Messages that the model's chat template does not read: they are refused, not dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_templates import LLAMA3, OPENED, QWEN3, model_with
from tests.support.messages import CALL, CALLED, USER, said, template_of, text_of
from tests.support.turns import after, feature_of, prompt_of
from twinkle_serve import hub
from twinkle_serve.errors import PromptError
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import encode_inputs

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


@pytest.fixture(scope="module")
def demo() -> Template:
    return Template(hub.DEMO)


UNREAD = "the model's chat template does not read"


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
