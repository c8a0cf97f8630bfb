"""Whether the gateway lives, and whether it can sample."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.data_format.status import SamplerStatus
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.json_response import JSON


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", summary="Whether the gateway is alive")
    async def healthz(request: Request) -> Response:
        return JSON({"status": "ok"})

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", summary="Whether each sampler has an engine that is ready, with the current weights")
    async def readyz(request: Request) -> Response:
        states = {name: await _readiness(context, name) for name in context.samplers.by_name}
        ready = all(state["ready"] for state in states.values())
        body = {"status": "ready" if ready else "unavailable", "samplers": states}
        return JSON(body, 200 if ready else 503, {} if ready else {"retry-after": "1"})

    return router


async def _readiness(context: GatewayContext, name: str) -> dict[str, Any]:
    try:
        status = await context.samplers.by_name[name].status()
    except TwinkleServeError:
        return {"ready": False, "state": "not running"}
    engines = {engine: state["state"] for engine, state in status["engines"].items()}
    state = "asleep" if status["asleep"] else "paused" if status["paused"] else "running"
    return {"ready": state != "asleep" and _has_current_engine(status), "state": state, "engines": engines}


def _has_current_engine(status: SamplerStatus) -> bool:
    return any(
        engine["state"] == "ready" and engine.get("weights") == status["tracks"][engine["track"]]
        for engine in status["engines"].values()
    )
