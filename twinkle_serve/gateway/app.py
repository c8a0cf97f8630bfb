"""The ASGI application of the gateway."""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from twinkle_serve.data_format import metrics
from twinkle_serve.data_format.metrics import MetricsSink
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.gateway import console, health, models, sessions
from twinkle_serve.gateway.anthropic import routes as messages
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.disconnects import EndsWithClient
from twinkle_serve.gateway.documents import errors_of
from twinkle_serve.gateway.errors import Failure, InvalidRequestError, Protocol
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.keys import Keys, require_scope
from twinkle_serve.gateway.models import ANTHROPIC_HEADER
from twinkle_serve.gateway.native import adapters, control, operations, sampling, tokens, weights
from twinkle_serve.gateway.openai import chat, completions
from twinkle_serve.gateway.openai.responses import routes as responses
from twinkle_serve.gateway.tinker import futures as tinker_futures
from twinkle_serve.gateway.tinker import sessions as tinker_sessions
from twinkle_serve.traces import Traces, carrying, valid_traceparent

OPEN_PATHS = console.PATHS | {"/healthz", "/readyz"}
"""Answered without a key: load balancers have none, and the console's page asks for one."""


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
    for module in (health, sampling, tokens, adapters, weights, control, operations, sessions):
        app.include_router(module.routes(context), responses=errors_of("native"))
    app.include_router(console.routes(context))
    for module in (tinker_sessions, tinker_futures):
        app.include_router(module.routes(context), responses=errors_of("tinker"))
    for kind in (TwinkleServeError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(EndsWithClient)
    app.add_middleware(Gate, keys=context.keys, sink=context.sink, traces=context.traces)  # the outer one
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
    """Middleware: checks keys, counts and records requests, and turns exceptions that no handler takes into answers."""

    def __init__(self, app: ASGIApp, keys: Keys, sink: MetricsSink | None = None, traces: Traces | None = None) -> None:
        self._app, self._keys, self._sink, self._traces = app, keys, sink, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1003})
            return
        if scope["path"] in OPEN_PATHS:
            await self._answer(scope, receive, send)
            return
        parent = valid_traceparent(Headers(scope=scope).get("traceparent"))
        if self._traces is None:
            with carrying(parent):
                await self._answer(scope, receive, send)
            return
        with (
            self._traces.span(scope["method"], parent, "SERVER", http_method=scope["method"]) as span,
            carrying(span.traceparent),
        ):
            status = await self._answer(scope, receive, send)
            path = _route(scope, status)
            span.name(f"{scope['method']} {path}".strip())
            span.set(http_route=path, http_status=status)
            if status >= 500:
                span.fail(f"status {status}")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Answers a request. Returns the status; 0 for a client that is gone before its answer."""
        status, began = 0, time.perf_counter()

        async def forward(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS:
                caller = self._keys.caller(Headers(scope=scope))
                require_scope(caller, "sample")
                scope["twinkle_serve.caller"] = caller
            await self._app(scope, receive, forward)
        except Exception as error:
            if not status:  # else the connection ends, and the client sees an incomplete answer
                await failed(scope, error)(scope, receive, forward)
        finally:
            if self._sink is not None:
                path = _route(scope, status)
                self._sink.add(metrics.HTTP_REQUESTS, 1, (path, scope["method"], str(status)))
                self._sink.observe(metrics.HTTP_SECONDS, [time.perf_counter() - began], (path,))
        return status


def _route(scope: Scope, status: int) -> str:
    """Returns the path of a request's route, with its parameters' names; "" for one that does not exist."""
    return getattr(scope.get("route"), "path", "") if status != 404 else ""
