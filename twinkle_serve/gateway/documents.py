"""The gateway's routes in its OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.gateway.context import SESSION_PREFIXES

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the part of a route's OpenAPI that describes its body. Routes read and validate bodies themselves."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema, definitions)}}}
    }


def add_routes(
    router: APIRouter,
    path: str,
    endpoint: Callable[[Request], Awaitable[Response]],
    summary: str,
    model: type[BaseModel],
) -> None:
    """Adds a POST route, by itself and as part of a session."""
    for prefix in SESSION_PREFIXES:
        name = f"{endpoint.__name__}{'_of_session' if prefix else ''}"
        router.add_api_route(
            prefix + path, endpoint, methods=["POST"], summary=summary, name=name, openapi_extra=json_body(model)
        )


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    """Replaces references to definitions by these: a route cannot add components to the document."""
    if isinstance(value, dict):
        if (reference := value.get("$ref")) is not None:
            return _inlined(definitions[reference.rsplit("/", 1)[-1]], definitions)
        return {key: _inlined(item, definitions) for key, item in value.items()}
    return [_inlined(item, definitions) for item in value] if isinstance(value, list) else value
