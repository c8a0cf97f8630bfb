"""Query strings: strict, as bodies are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import Request

from twinkle_serve.errors import unknown_name
from twinkle_serve.gateway.errors import InvalidRequestError

Choice = TypeVar("Choice", bound=str)


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


def number_of(request: Request, name: str, default: float) -> float:
    """Returns a finite number of the query. Raises InvalidRequestError."""
    given = request.query_params.get(name)
    try:
        number = default if given is None else float(given)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidRequestError(f"{name} must be a number, got {given!r:.100}.", name)
    return number


def choice_of(request: Request, name: str, choices: Sequence[Choice]) -> Choice:
    """Returns a parameter of the query that is one of a few words; the first is the default.

    Raises:
        InvalidRequestError: it is another.
    """
    given = request.query_params.get(name, choices[0])
    for choice in choices:
        if choice == given:
            return choice
    raise InvalidRequestError(f"{name} must be {' or '.join(choices)}, got {given!r:.100}.", name)
