"""For operators and the console: history, running calls, engines."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve import timing
from twinkle_serve.gateway.bodies import read_model
from twinkle_serve.gateway.context import GatewayContext, caller_of
from twinkle_serve.gateway.documents import described
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.keys import require_scope
from twinkle_serve.gateway.native.fields import CancelBody, EngineBody
from twinkle_serve.gateway.native.media import JSON_MEDIA
from twinkle_serve.gateway.native.schemas import BOOLEAN, NUMBER, STRING, WHOLE, object_of
from twinkle_serve.gateway.public import shown_message
from twinkle_serve.gateway.queries import number_of, refuse_query, sampler_of
from twinkle_serve.routing.api import RouterAPI

OBJECTS = {"type": "array", "items": {"type": "object"}}
REPORT = object_of(now=NUMBER, period_s=NUMBER, points=OBJECTS, events=OBJECTS)


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["native"])
    of_report, of_calls = {JSON_MEDIA: REPORT}, {JSON_MEDIA: object_of(calls=OBJECTS)}
    of_cancel = {JSON_MEDIA: object_of(id=STRING, cancelled=WHOLE)}
    of_engine = {JSON_MEDIA: object_of(engine=STRING, done=BOOLEAN)}

    @router.get("/telemetry", **described("History of the last hour", answers=of_report, query=("since", "sampler")))
    async def telemetry(request: Request) -> Response:
        refuse_query(request, "since", "sampler")
        client = context.samplers.named(request.query_params.get("sampler")).client
        since = number_of(request, "since", 0.0)
        report = await client.call(timing.ROUTER_GRACE_S, RouterAPI.telemetry, since)
        events = [{**event, "text": shown_message(event["text"])} for event in report["events"]]
        return JSON({**report, "events": events})

    @router.get("/calls", **described("Running calls, the oldest first", answers=of_calls, query=("sampler",)))
    async def calls(request: Request) -> Response:
        require_scope(caller_of(request), "admin")
        client = context.samplers.named(sampler_of(request)).client
        return JSON({"calls": await client.call(timing.ROUTER_GRACE_S, RouterAPI.calls)})

    @router.post("/calls/cancel", **described("Cancel a running call", body=CancelBody, answers=of_cancel))
    async def cancel(request: Request) -> Response:
        require_scope(caller_of(request), "admin")
        refuse_query(request)
        body = await read_model(request, context.limits, CancelBody)
        client = context.samplers.named(body.sampler).client
        count = await client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.cancel, body.id)
        return JSON({"id": body.id, "cancelled": count})

    @router.post("/engines/drain", **described("Give an engine no more prompts", body=EngineBody, answers=of_engine))
    async def drain(request: Request) -> Response:
        body = await _engine(request)
        client = context.samplers.named(body.sampler).client
        limit_s = body.timeout_s + timing.ANSWER_TIMEOUT_S
        await client.call(limit_s, RouterAPI.drain_engine, body.engine, body.timeout_s)
        return JSON({"engine": body.engine, "done": True})

    @router.post("/engines/undrain", **described("Use a drained engine again", body=EngineBody, answers=of_engine))
    async def undrain(request: Request) -> Response:
        body = await _engine(request)
        client = context.samplers.named(body.sampler).client
        await client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.undrain_engine, body.engine)
        return JSON({"engine": body.engine, "done": True})

    @router.post(
        "/engines/restart",
        **described(
            "Drain an engine and replace its process; answers when it is in use again",
            body=EngineBody,
            answers=of_engine,
        ),
    )
    async def restart(request: Request) -> Response:
        body = await _engine(request)
        client = context.samplers.named(body.sampler).client
        start_s = timing.CONTROL_TIMEOUT_S
        await client.call(
            body.timeout_s + start_s, RouterAPI.restart_engine, body.engine, body.timeout_s, body.timeout_s + start_s
        )
        return JSON({"engine": body.engine, "done": True})

    async def _engine(request: Request) -> EngineBody:
        require_scope(caller_of(request), "admin")
        refuse_query(request)
        return await read_model(request, context.limits, EngineBody)

    return router
