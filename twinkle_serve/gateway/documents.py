"""The gateway's routes in its OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.gateway.context import SESSION_PREFIXES
from twinkle_serve.gateway.errors import Protocol

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

Schema = Mapping[str, Any]

_STRING = {"type": "string"}
_ERRORS: dict[Protocol, Schema] = {
    "openai": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {"message": _STRING, "type": _STRING},
            }
        },
    },
    "anthropic": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"message": _STRING, "type": _STRING},
            },
        },
    },
    "tinker": {
        "type": "object",
        "required": ["detail", "error", "category"],
        "properties": {"detail": _STRING, "error": _STRING, "category": {"enum": ["user", "server"]}},
    },
    "native": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {
                    "type": _STRING,
                    "message": _STRING,
                    "param": _STRING,
                    "retry_after_s": {"type": "number"},
                },
            }
        },
    },
}
"""Schema of an error in each protocol, see `Failure.body`."""


def errors_of(protocol: Protocol) -> dict[int | str, dict[str, Any]]:
    """Returns the `responses` of a protocol's routes that are errors."""
    content = {"application/json": {"schema": _ERRORS[protocol]}}
    return {
        "4XX": {"description": "The request is invalid, not allowed, or not served now.", "content": content},
        "5XX": {"description": "The sampler is not ready, or failed, or the deadline passed.", "content": content},
    }


def add_routes(router: APIRouter, path: str, endpoint: Endpoint, summary: str, model: type[BaseModel]) -> None:
    """Adds a POST route, by itself and as part of a session."""
    for prefix in SESSION_PREFIXES:
        name = f"{endpoint.__name__}{'_of_session' if prefix else ''}"
        router.add_api_route(
            prefix + path, endpoint, methods=["POST"], summary=summary, name=name, openapi_extra=json_body(model)
        )


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the part of a route's OpenAPI that describes its body. Routes read and validate bodies themselves."""
    return _body("application/json", inlined(model))


def _body(media: str, schema: Schema) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


def inlined(model: type[BaseModel]) -> Schema:
    """Returns the schema of a model without references: a route cannot add components to the document."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    whole: Schema = _inlined(schema, definitions)
    return whole


def described(
    summary: str,
    *,
    answers: Mapping[str, Schema],
    body: type[BaseModel] | None = None,
    parts: Schema | None = None,
    media: str | None = None,
    query: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the keyword arguments of a route that describe it.

    Args:
        answers: schema of the answer, by media type.
        body: a body of JSON.
        parts: schema of a body that is a form with files.
        media: type of a body that is a file.
        query: parameters of the query, none of them required.
    """
    extra: dict[str, Any] = {}
    if body is not None:
        extra |= json_body(body)
    if parts is not None:
        extra |= _body("multipart/form-data", parts)
    if media is not None:
        extra |= _body(media, {"type": "string", "format": "binary"})
    if query:
        extra["parameters"] = [
            {"name": name, "in": "query", "required": False, "schema": {"type": "string"}} for name in query
        ]
    extra["responses"] = {"200": {"content": {media: {"schema": schema} for media, schema in answers.items()}}}
    return {"summary": summary, "openapi_extra": extra}


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    """Replaces references to definitions by these."""
    if isinstance(value, dict):
        if (reference := value.get("$ref")) is not None:
            return _inlined(definitions[reference.rsplit("/", 1)[-1]], definitions)
        return {key: _inlined(item, definitions) for key, item in value.items()}
    return [_inlined(item, definitions) for item in value] if isinstance(value, list) else value
