"""Tools of a conversation: their copies, and nulls that a columnar format fills into them and into calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from twinkle_serve.data_format.json_schemas import declared_types, properties_of, variants_of
from twinkle_serve.data_format.plain import PLAIN, as_items, is_absent, plain, shown
from twinkle_serve.errors import PromptError

VALUES = ("default", "const")
"""Keys of a JSON schema for which null may be the value."""


def copied_tools(tools: object, where: str) -> list[object] | None:
    """Copies the tools of an input; None if there are none.

    Keys whose value is None are left out: JSON schemas have no such keys, and a columnar format adds them to give each
    tool the keys of all. A null `default` or `const` stays where the schema allows null.

    Raises:
        PromptError: not a list of dicts.
    """
    if is_absent(tools):
        return None
    items = as_items(tools)
    if items is None:
        raise PromptError(f"{where}.tools must be a list, got {tools!r}.")
    return [_copied_tool(tool, f"{where}.tools[{k}]") for k, tool in enumerate(items)]


def _copied_tool(tool: object, where: str) -> object:
    if callable(tool):
        return tool
    try:
        copied = plain(tool)
    except RecursionError:
        raise PromptError(f"{where} is nested too deeply.") from None
    if not isinstance(copied, dict):
        raise PromptError(f"{where} must be a dict, got {shown(tool)}.")
    require_json(copied, f"{where} has")
    return _without_filled(copied)


def require_json(value: object, subject: str) -> None:
    """Refuses what JSON does not have, at every depth: templates would write something else. The error begins so."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise PromptError(f"{subject} the key {key!r}, and JSON's keys are strings. Write it as text.")
            require_json(item, subject)
    elif isinstance(value, list):
        for item in value:
            require_json(item, subject)
    elif isinstance(value, float) and not math.isfinite(value):
        raise PromptError(
            f"{subject} the number {value}, which JSON does not have. Write null or text, or leave it out."
        )
    elif not isinstance(value, PLAIN):
        raise PromptError(f"{subject} the value {shown(value)}, which JSON does not have. Write it as text.")


def without_filled_arguments(arguments: Any, schema: object, root: object) -> Any:
    """Removes null arguments that `schema` declares and does not allow to be null, or does not declare.

    A columnar format adds them to give each call the arguments of all. Without a schema, null is a value as any other.

    Args:
        arguments: arguments of a call, or a part of them.
        schema: JSON schema of that part.
        root: JSON schema of all arguments, to which references point.
    """
    properties = properties_of(schema, root)
    if isinstance(arguments, dict) and properties is not None:
        return {
            key: without_filled_arguments(value, properties.get(key), root)
            for key, value in arguments.items()
            if value is not None or _allows_null(properties.get(key), root)
        }
    if isinstance(arguments, list):
        items = next((variant["items"] for variant in variants_of(schema, root) if "items" in variant), None)
        return [without_filled_arguments(value, items, root) for value in arguments]
    return arguments


def _without_filled(schema: Any, named: bool = False) -> Any:
    """Removes keys without a value; `named` for a mapping of parameters' names to their schemas."""
    if isinstance(schema, list):
        return [_without_filled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    allowed = VALUES if not named and _allows_null(schema, schema) else ()
    return {
        key: _without_filled(value, key == "properties" and not named)
        for key, value in schema.items()
        if value is not None or key in allowed
    }


def _allows_null(schema: object, root: object) -> bool:
    """Whether a JSON schema allows null. One whose type is itself null comes from a columnar format and does not."""
    if not isinstance(schema, Mapping):
        return False
    types = declared_types(schema, root)
    return "null" in types or (not types and ("type" not in schema or schema["type"] is not None))
