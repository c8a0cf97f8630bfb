"""Query strings: strict, as bodies are."""

from __future__ import annotations

from starlette.requests import Request

from twinkle_serve.errors import unknown_name
from twinkle_serve.gateway.errors import InvalidRequestError


def refuse_query(request: Request, *known: str) -> None:
    """Raises InvalidRequestError for a parameter of the query that is unknown, or there twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            raise InvalidRequestError(unknown_name("query parameter", name[:100], known) + ".", name[:100])
        if names.count(name) > 1:
            raise InvalidRequestError(f"the query has {name} twice. Give it once.", name)


def sampler_of(request: Request) -> str | None:
    """Returns the query's `sampler`, its only parameter. Raises InvalidRequestError for any other."""
    refuse_query(request, "sampler")
    return request.query_params.get("sampler")
