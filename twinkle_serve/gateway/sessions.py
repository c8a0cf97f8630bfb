"""Sessions of HTTP clients: their trajectories, and their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.errors import SessionError, SessionNotFoundError
from twinkle_serve.gateway.context import GatewayContext, caller_of
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.keys import require_scope
from twinkle_serve.gateway.samplers import Sampler
from twinkle_serve.sessions import SessionRecord, features, trajectory

FORMATS = ("tree", "features")
QUERY = ("format", "nodes", "shared_tokens_once", "sampler")


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["Sessions"])

    @router.get(
        "/session/{session}/trajectory",
        summary="The turns of a session: a tree, or its paths as training inputs",
        openapi_extra=_parameters(
            format={"type": "string", "enum": list(FORMATS), "default": FORMATS[0]},
            nodes={"type": "string", "pattern": r"^\d{1,9}(,\d{1,9})*$"},
            shared_tokens_once={"type": "string", "enum": ["true", "false"], "default": "false"},
            sampler={"type": "string"},
        ),
    )
    async def read(session: str, request: Request) -> Response:
        query = _query(request)
        record = await _record(context, session, query.get("sampler"))
        if query.get("format", FORMATS[0]) == "tree":
            _refuse(query, ("nodes", "shared_tokens_once"), "format=features")
            return await run_in_threadpool(lambda: JSON(trajectory(record)))
        nodes, once = _nodes(query.get("nodes")), query.get("shared_tokens_once", "false") == "true"
        return await run_in_threadpool(
            lambda: JSON({"session": session, "features": features(record, nodes, shared_tokens_once=once)})
        )

    @router.delete("/session/{session}", summary="End a session, and delete its turns")
    async def end(session: str, request: Request) -> Response:
        ended = [await sampler.sessions.end_session(session) for sampler in _each(context)]
        return JSON({"session": session, "ended": any(ended)})

    @router.get("/sessions", summary="All sessions, the least recently used one first")
    async def every(request: Request) -> Response:
        require_scope(caller_of(request), "admin")
        return JSON(
            {
                "sessions": [
                    {
                        "id": info.id,
                        "sampler": sampler.name,
                        "created": info.created,
                        "expires": info.expires,
                        "size_bytes": info.size_bytes,
                    }
                    for sampler in _each(context)
                    for info in await sampler.sessions.list_sessions()
                ]
            }
        )

    return router


def _each(context: GatewayContext) -> Sequence[Sampler]:
    """Returns a sampler for each application."""
    return list({sampler.application: sampler for sampler in context.samplers.by_name.values()}.values())


async def _record(context: GatewayContext, session: str, name: str | None) -> SessionRecord:
    """Reads a session from the sampler that has it.

    Args:
        name: of that sampler; needed if several have a session of this id.

    Raises:
        SessionError: none has it, it has ended, or several have it.
    """
    samplers = _each(context) if name is None else [context.samplers.named(name)]
    records: dict[str, SessionRecord] = {}
    missing: SessionError = SessionNotFoundError(f"there is no session {session!r}.")
    for sampler in samplers:
        try:
            records[sampler.name] = await sampler.sessions.read_session(session)
        except SessionNotFoundError:
            continue
        except SessionError as error:
            missing = error
    if not records:
        raise missing
    if len(records) > 1:
        names = ", ".join(records)
        raise SessionError(f"session {session!r} has turns of several samplers. Add ?sampler=, one of {names}.")
    return next(iter(records.values()))


def _query(request: Request) -> dict[str, str]:
    """Returns the query. Raises InvalidRequestError for an unknown or repeated key, or an invalid value."""
    query: dict[str, str] = {}
    for key, value in request.query_params.multi_items():
        if key not in QUERY or key in query:
            problem = "is there twice" if key in query else f"is unknown; known: {', '.join(QUERY)}"
            raise InvalidRequestError(f"the query's key {key!r} {problem}.", key)
        query[key] = value
    if query.get("format", FORMATS[0]) not in FORMATS:
        raise InvalidRequestError(f"format must be {' or '.join(FORMATS)}, got {query['format']!r}.", "format")
    if query.get("shared_tokens_once", "true") not in ("true", "false"):
        raise InvalidRequestError("shared_tokens_once must be true or false.", "shared_tokens_once")
    return query


def _refuse(query: dict[str, str], keys: Sequence[str], remedy: str) -> None:
    for key in keys:
        if key in query:
            raise InvalidRequestError(f"{key} needs {remedy}.", key)


def _nodes(given: str | None) -> list[int] | None:
    if given is None:
        return None
    numbers = given.split(",")
    if not all(number.isascii() and number.isdecimal() and len(number) < 10 for number in numbers):
        raise InvalidRequestError(f"nodes must be numbers separated by commas, got {given!r:.100}.", "nodes")
    return [int(number) for number in numbers]


def _parameters(**schemas: dict[str, Any]) -> dict[str, Any]:
    """Returns the query's part of a route's OpenAPI."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in schemas.items()
        ]
    }
