"""The gateway's routes in its OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the part of a route's OpenAPI that describes its body. Routes read and validate bodies themselves."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema, definitions)}}}
    }


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    """Replaces references to definitions by these: a route cannot add components to the document."""
    if isinstance(value, dict):
        if (reference := value.get("$ref")) is not None:
            return _inlined(definitions[reference.rsplit("/", 1)[-1]], definitions)
        return {key: _inlined(item, definitions) for key, item in value.items()}
    return [_inlined(item, definitions) for item in value] if isinstance(value, list) else value
