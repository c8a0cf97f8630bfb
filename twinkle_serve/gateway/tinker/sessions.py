"""Tinker's requests around samples: configuration, sessions, samplers, models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve import timing
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.gateway.bodies import read_body, read_model
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.documents import described
from twinkle_serve.gateway.errors import GoneError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.samplers import Sampler
from twinkle_serve.gateway.tinker.bodies import CreateSamplingSession, Notice, SessionRequest, WeightsInfo
from twinkle_serve.gateway.tinker.ids import SamplingSession, new_session
from twinkle_serve.gateway.tinker.models import TinkerModels
from twinkle_serve.routing.api import RouterAPI

REFRESH_S = 300
"""How often clients ask for their dynamic configuration."""
MAX_CANCELS = 64
"""Requests that a client cancels at the same time."""
HEARTBEAT_TIMEOUT_S = 5.0
"""Clients wait 10 s for the answer to a heartbeat, and send the next one then."""

OBJECT = {"application/json": {"type": "object"}}


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["Tinker"])
    models = TinkerModels(context)

    @router.post("/client/config", **described("Flags of the client", answers=OBJECT, body=Notice))
    async def client_config(request: Request) -> Response:
        await read_model(request, context.limits, Notice)
        return JSON({"sample_use_retrieve_futures": context.args.tinker_poller, "pjwt_auth_enabled": False})

    @router.post("/client/dynamic_config", **described("Flags that may change", answers=OBJECT, body=Notice))
    async def dynamic_config(request: Request) -> Response:
        await read_model(request, context.limits, Notice)
        return JSON(
            {
                "refresh_interval_sec": REFRESH_S,
                "sample_cancel_enabled": True,
                "sample_cancel_max_batch_size": MAX_CANCELS,
            }
        )

    @router.post("/create_session", **described("Begin a session", answers=OBJECT, body=Notice))
    async def create_session(request: Request) -> Response:
        await read_model(request, context.limits, Notice)
        return JSON({"type": "create_session", "session_id": new_session()})

    @router.post("/session_heartbeat", **described("Keep a session's calls", answers=OBJECT, body=SessionRequest))
    async def heartbeat(request: Request) -> Response:
        body = await read_model(request, context.limits, SessionRequest)
        if False in await _everywhere(context, lambda each: _renew(each, body.session_id)):
            raise GoneError(f"session {body.session_id!r} has ended.")
        return JSON({"type": "session_heartbeat"})

    @router.post("/sessions/{session_id}/finish", **described("End a session", answers=OBJECT, body=Notice))
    async def finish(session_id: str, request: Request) -> Response:
        await read_model(request, context.limits, Notice)
        await _everywhere(context, lambda each: _end(each, session_id))
        return JSON({})

    @router.post("/telemetry", **described("Accepted; nothing is kept", answers=OBJECT))
    async def telemetry(request: Request) -> Response:
        await read_body(request, context.limits)
        return JSON({"status": "accepted"})

    @router.post(
        "/create_sampling_session",
        **described("Fix a model's version to sample from", answers=OBJECT, body=CreateSamplingSession),
    )
    async def create_sampling_session(request: Request) -> Response:
        body = await read_model(request, context.limits, CreateSamplingSession)
        session = await models.session(body)
        if not await _renew(models.sampler(session), body.session_id):
            raise GoneError(f"session {body.session_id!r} has ended. Make a new client.")
        return JSON({"type": "create_sampling_session", "sampling_session_id": session.id})

    @router.get("/samplers/{sampling_session_id}", **described("The model of a sampling session", answers=OBJECT))
    async def sampler(sampling_session_id: str, request: Request) -> Response:
        session = SamplingSession.of(sampling_session_id)
        answer = {"sampler_id": session.id, "base_model": await models.base_model(models.sampler(session))}
        return JSON(answer | ({"model_path": session.model_path} if session.adapter else {}))

    @router.post("/weights_info", **described("The base model of a path", answers=OBJECT, body=WeightsInfo))
    async def weights_info(request: Request) -> Response:
        body = await read_model(request, context.limits, WeightsInfo)
        sampler, adapter = await models.of_path(body.tinker_path)
        return JSON({"base_model": await models.base_model(sampler), "is_lora": bool(adapter)})

    @router.get("/get_server_capabilities", **described("The models that can be sampled from", answers=OBJECT))
    async def capabilities(request: Request) -> Response:
        return JSON({"supported_models": await models.supported()})

    @router.get("/healthz", **described("Whether the gateway is alive", answers=OBJECT))
    async def healthz(request: Request) -> Response:
        return JSON({"status": "ok"})

    return router


async def _renew(sampler: Sampler, session: str) -> bool:
    return await sampler.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.renew_futures, session)


async def _end(sampler: Sampler, session: str) -> None:
    await sampler.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.end_futures, session)


async def _everywhere(context: GatewayContext, call: Callable[[Sampler], Awaitable[Any]]) -> list[Any]:
    """Calls the router of each sampler. Returns the answers of those that are there: a lease outlasts a restart."""
    samplers = {sampler.application: sampler for sampler in context.samplers.by_name.values()}

    async def answer(sampler: Sampler) -> Any:
        try:
            async with asyncio.timeout(HEARTBEAT_TIMEOUT_S):
                return await call(sampler)
        except (TwinkleServeError, TimeoutError):
            return None

    return await asyncio.gather(*map(answer, samplers.values()))
