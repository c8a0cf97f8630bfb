"""`/status`, and pauses."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve import timing
from twinkle_serve.data_format.status import EngineStatus, SamplerStatus
from twinkle_serve.gateway.bodies import read_model
from twinkle_serve.gateway.context import GatewayContext, caller_of
from twinkle_serve.gateway.documents import described
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.keys import require_scope
from twinkle_serve.gateway.native.fields import PauseBody, ResumeBody
from twinkle_serve.gateway.native.media import JSON_MEDIA
from twinkle_serve.gateway.native.schemas import BOOLEAN, LABELS, NUMBER, STRING, WHOLE, object_of
from twinkle_serve.gateway.public import shown_message, shown_model
from twinkle_serve.gateway.queries import refuse_query, sampler_of
from twinkle_serve.routing.api import RouterAPI

STATUS = object_of(
    model_id=STRING,
    engines={"type": "object"},
    groups_waiting=WHOLE,
    requests=WHOLE,
    paused=BOOLEAN,
    asleep=BOOLEAN,
    weights=STRING,
    tracks=LABELS,
    adapters={"type": "object"},
    adapter_versions={"type": "object"},
)


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["native"])
    of_status = {JSON_MEDIA: STATUS}
    of_pause, of_resume = {JSON_MEDIA: object_of(pause=WHOLE, lease_s=NUMBER)}, {JSON_MEDIA: object_of(resumed=BOOLEAN)}

    @router.get("/status", **described("Engines, adapters and queues", answers=of_status, query=("sampler",)))
    async def status(request: Request) -> Response:
        state = await context.samplers.named(sampler_of(request)).status()
        return JSON({**state, "model_id": shown_model(state["model_id"]), "engines": _shown_engines(state)})

    @router.post("/pause", **described("Pause all engines, or renew a pause", body=PauseBody, answers=of_pause))
    async def pause(request: Request) -> Response:
        require_scope(caller_of(request), "admin")
        refuse_query(request)
        body = await read_model(request, context.limits, PauseBody)
        client = context.samplers.named(body.sampler).client
        if body.pause is None:  # the mode "wait" takes as long as samples do
            number = await client.call(timing.CONTROL_TIMEOUT_S, RouterAPI.pause, body.mode, body.lease_s)
        else:
            number = body.pause
            await client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.renew_pause, number, body.lease_s)
        return JSON({"pause": number, "lease_s": body.lease_s})

    @router.post("/resume", **described("End a pause", body=ResumeBody, answers=of_resume))
    async def resume(request: Request) -> Response:
        require_scope(caller_of(request), "admin")
        refuse_query(request)
        body = await read_model(request, context.limits, ResumeBody)
        client = context.samplers.named(body.sampler).client
        await client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.resume, body.pause)
        return JSON({"resumed": True})

    return router


def _shown_engines(state: SamplerStatus) -> dict[str, EngineStatus]:
    """Returns the engines' states, with their failures as clients may see them."""
    engines: dict[str, EngineStatus] = {}
    for name, engine in state["engines"].items():
        engines[name] = engine.copy()
        if "last_failure" in engine:
            engines[name]["last_failure"] = shown_message(engine["last_failure"])
    return engines
