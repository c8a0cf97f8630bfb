"""The form of an answer, as its request asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from starlette.requests import Request

from twinkle_serve.gateway.errors import NotAcceptableError

Form: TypeAlias = Literal["json", "lines", "tensors"]

JSON_MEDIA, LINES_MEDIA, TENSORS_MEDIA = "application/json", "application/x-ndjson", "application/octet-stream"
FORMS: dict[str, Form] = {
    LINES_MEDIA: "lines",
    TENSORS_MEDIA: "tensors",
    JSON_MEDIA: "json",
    "application/*": "json",
    "*/*": "json",
}
"""By media type of the header `Accept`."""


def form_of(request: Request, forms: Sequence[Form] = ("json", "lines", "tensors")) -> Form:
    """Returns the first form that a request's `Accept` names; JSON where there is no such header.

    Raises:
        NotAcceptableError: it names none of `forms`.
    """
    given = ",".join(request.headers.getlist("accept")).strip()
    if not given:
        return "json"
    names = [part.partition(";")[0].strip().lower() for part in given.split(",")]
    named = [FORMS[name] for name in names if name in FORMS and FORMS[name] in forms]
    if not named:
        known = ", ".join(media for media, form in FORMS.items() if form in forms and "*" not in media)
        raise NotAcceptableError(f"accept must name one of {known}, got {given[:200]!r}.")
    return named[0]
