"""Messages, and the text that a template makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.chat_templates import model_with
from tests.support.turns import prompt_of
from twinkle_serve.template import Template

USER: dict[str, Any] = {"role": "user", "content": "hi"}
CALL = {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def template_of(folder: Path, source: str, **options: Any) -> Template:
    return Template(model_with(folder, source), **options)


def text_of(template: Template, messages: Any, tools: Any = None) -> str:
    return template.decode(prompt_of({"messages": messages, "tools": tools}, template).ids)


def said(role: str, content: str = "and more") -> dict[str, Any]:
    return {"role": role, "content": content}
