"""Tools and their calls as plain dicts, in OpenAI's form."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class FunctionCall(TypedDict, total=False):
    """The function that a call names."""

    name: str
    arguments: str | dict[str, Any]
    """By name, or as JSON text."""


class ToolCall(TypedDict, total=False):
    """A call of a tool, in an assistant's message."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionSpec(TypedDict, total=False):
    """The function that a tool declares."""

    name: str
    description: str
    parameters: str | dict[str, Any]
    """JSON schema of its arguments."""


class Tool(TypedDict, total=False):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionSpec
