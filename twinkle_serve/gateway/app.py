"""The ASGI application of the gateway."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.gateway import health, models, sessions
from twinkle_serve.gateway.anthropic import routes as messages
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.disconnects import EndsWithClient
from twinkle_serve.gateway.documents import errors_of
from twinkle_serve.gateway.errors import Failure, InvalidRequestError, Protocol
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.keys import Keys, require_scope
from twinkle_serve.gateway.models import ANTHROPIC_HEADER
from twinkle_serve.gateway.native import adapters, control, sampling, tokens
from twinkle_serve.gateway.openai import chat, completions
from twinkle_serve.gateway.openai.responses import routes as responses
from twinkle_serve.gateway.tinker import futures
from twinkle_serve.gateway.tinker import sessions as tinker_sessions

OPEN_PATHS = ("/healthz", "/readyz")
"""Answered without a key: load balancers have none."""


def build_app(context: GatewayContext) -> FastAPI:
    """Builds the application."""
    app = FastAPI(
        title="Twinkle Serve",
        summary="The sampler of an RL post-training run.",
        redoc_url=None,
        redirect_slashes=False,
    )
    for module in (models, completions, chat, responses):
        app.include_router(module.routes(context), responses=errors_of("openai"))
    app.include_router(messages.routes(context), responses=errors_of("anthropic"))
    for module in (health, sampling, tokens, adapters, control, sessions):
        app.include_router(module.routes(context), responses=errors_of("native"))
    for module in (tinker_sessions, futures):
        app.include_router(module.routes(context), responses=errors_of("tinker"))
    for kind in (TwinkleServeError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(EndsWithClient)
    app.add_middleware(Gate, keys=context.keys)  # the outer one
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):  # of FastAPI's own parameters
        error = InvalidRequestError("; ".join(str(item.get("msg")) for item in error.errors()))
    return failed(request.scope, error)


def failed(scope: Scope, error: BaseException) -> Response:
    """Returns the answer for an exception, in the form of the path's protocol."""
    failure = Failure.of(error)
    protocol = protocol_of(scope["path"], Headers(scope=scope))
    return JSON(failure.body(protocol), failure.status, failure.headers)


def protocol_of(path: str, headers: Mapping[str, str]) -> Protocol:
    """Returns the protocol of a path; of `/session/{id}/v1/…`, that of the path behind it.

    Args:
        headers: by lower-case name. They decide for the paths of models, which two protocols share.
    """
    if path.startswith("/session/") and "/v1/" in path:
        path = path[path.index("/v1/") :]
    if path.startswith("/v1/messages") or (path.startswith("/v1/models") and ANTHROPIC_HEADER in headers):
        return "anthropic"
    if path.startswith("/v1/"):
        return "openai"
    if "/api/v1/" in path:
        return "tinker"
    return "native"


class Gate:
    """Middleware: checks keys, and turns exceptions that no handler takes into answers."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1003})
            return
        started = False

        async def forward(message: dict[str, object]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS:
                caller = self._keys.caller(Headers(scope=scope))
                require_scope(caller, "sample")
                scope["twinkle_serve.caller"] = caller
            await self._app(scope, receive, forward)  # type: ignore[arg-type]
        except Exception as error:
            response = failed(scope, error)
            if started:  # the connection ends, and the client sees an incomplete answer
                return
            await response(scope, receive, send)
