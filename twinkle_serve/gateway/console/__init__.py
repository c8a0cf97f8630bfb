"""The console: a page that shows a service in a browser and operates it.

Its files are served as they are. They use the routes that any other client has, with a key that the page asks for, so
they need none themselves.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.gateway.context import GatewayContext

DIRECTORY = Path(__file__).parent / "static"

MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}

PAGE = "index.html"

HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""The page runs its own scripts alone, talks to its own gateway alone, and is part of no other page."""


def _files() -> dict[str, Path]:
    """Returns the files by the path of their route."""
    files = {f"/console/{file.name}": file for file in sorted(DIRECTORY.iterdir()) if file.suffix in MEDIA_TYPES}
    return {"/": files.pop(f"/console/{PAGE}"), **files}


FILES = _files()

PATHS = frozenset(FILES)
"""Answered without a key."""


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, file in FILES.items():
        router.add_api_route(path, _Static(file), methods=["GET", "HEAD"], response_class=Response)
    return router


class _Static:
    """Answers with a file."""

    def __init__(self, file: Path) -> None:
        self._content = file.read_bytes()
        self._media_type = MEDIA_TYPES[file.suffix]

    async def __call__(self, request: Request) -> Response:
        return Response(self._content, headers=HEADERS, media_type=self._media_type)
