"""Tinker's samples: `asample`, and the futures by which they are collected."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve import timing
from twinkle_serve.data_format.futures import FutureResult, Submission
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import (
    ConfigError,
    DeadlineError,
    LeaseExpiredError,
    QueueFullError,
    RequestError,
    ServiceError,
    TwinkleServeError,
)
from twinkle_serve.gateway.bodies import read_model
from twinkle_serve.gateway.context import GatewayContext, caller_of
from twinkle_serve.gateway.documents import described
from twinkle_serve.gateway.errors import GoneError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.samplers import Sampler, Target
from twinkle_serve.gateway.tinker.answers import sample_response
from twinkle_serve.gateway.tinker.bodies import FutureRequest, RetrieveFuture, RetrieveFutures, SampleBody
from twinkle_serve.gateway.tinker.calls import Wanted, call_of
from twinkle_serve.gateway.tinker.ids import RequestId, SamplingSession
from twinkle_serve.gateway.tinker.lost import LostFutures
from twinkle_serve.gateway.tinker.models import TinkerModels
from twinkle_serve.routing.api import RouterAPI

HOLD_S = 25.0
"""How long a request for results waits; clients wait 45 s for its answer."""
UNREACHABLE_PAUSE_S = 1.0
"""Pause before an answer of 503: clients ask again at once."""
INLINE_BYTES = 2**20
"""Size of an answer above which a client that asks for it is told the size first."""

PROTOBUF = "application/x-protobuf"

REPEATED = (QueueFullError, LeaseExpiredError)
"""Errors of calls that the client should send again, under a new number."""

OBJECT: dict[str, Any] = {"application/json": {"type": "object"}}
RESULT: dict[str, Any] = {PROTOBUF: {"type": "string", "format": "binary"}, **OBJECT}
PENDING: dict[str, Any] = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["type", "request_id", "queue_state"],
            "properties": {"type": {"const": "try_again"}, "request_id": {"type": "string"}},
        }
    }
}


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["Tinker"])
    models = TinkerModels(context)
    lost = LostFutures()

    @router.post("/asample", **described("Begin to sample", answers=OBJECT, body=SampleBody))
    async def asample(request: Request) -> Response:
        body = await read_model(request, context.limits, SampleBody)
        session = SamplingSession.of(body.sampling_session_id)
        sampler, future = models.sampler(session), RequestId(session, body.seq_id)
        submission = Submission(
            id=session.request_id(body.seq_id),
            session=session.session,
            group=future.group,
            request=_request(body, context, Target(session.sampler, sampler, session.adapter), request),
            note=Wanted.of(body).packed(),
        )
        try:
            incarnation = await sampler.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.submit, submission)
        except LeaseExpiredError as error:
            raise GoneError(str(error)) from None
        if context.args.tinker_poller:
            lost.watch(sampler, incarnation, submission)
        ids = [f"{submission.id}.{i}" for i in range(min(body.num_samples, context.limits.samples))]
        return JSON({"request_id": submission.id, "sample_sequence_ids": ids})

    @router.post(
        "/retrieve_future",
        **described("Collect samples", answers=RESULT, body=RetrieveFuture),
        responses={408: {"description": "They are not done yet: ask again.", "content": PENDING}},
    )
    async def retrieve_future(request: Request) -> Response:
        body = await read_model(request, context.limits, RetrieveFuture)
        sampler = models.sampler(RequestId.of(body.request_id).sampling_session)
        (result,) = await _patiently(sampler, [body.request_id])
        if result.state != "pending":
            lost.forget([body.request_id])
        return await _answer(sampler, result, body.allow_metadata_only)

    @router.post("/retrieve_futures", **described("List samples that are done", answers=OBJECT, body=RetrieveFutures))
    async def retrieve_futures(request: Request) -> Response:
        body = await read_model(request, context.limits, RetrieveFutures)
        session = SamplingSession.of(body.target.sampling_session_id)
        client = models.sampler(session).client
        own = [each for each in body.retrieved_request_ids if each.startswith(f"{session.id}.")]
        if own:
            lost.forget(own)
            await client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.forget, own)
        wait_s = HOLD_S if body.timeout is None else min(HOLD_S, body.timeout)
        group = session.group(body.target.cloned_sampler_id)
        ended = await client.call(wait_s, RouterAPI.completions, group, body.prev_cursor, wait_s)
        completions: list[dict[str, Any]] = [
            {"state": "failed", "request_id": each.id}
            if each.failed
            else {"state": "finished", "request_id": each.id, "response_payload_uncompressed_size": each.size_bytes}
            for each in ended.completions
        ]
        return JSON({"completions": completions, "cursor": ended.cursor})

    @router.post("/cancel_future", **described("Give samples up", answers=OBJECT, body=FutureRequest))
    async def cancel_future(request: Request) -> Response:
        body = await read_model(request, context.limits, FutureRequest)
        sampler = models.sampler(RequestId.of(body.request_id).sampling_session)
        lost.forget([body.request_id])
        await sampler.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.forget, [body.request_id])
        return JSON({})

    return router


def _request(
    body: SampleBody, context: GatewayContext, target: Target, request: Request
) -> SampleRequest | TwinkleServeError:
    """Returns the call of a request, or the error as which its future fails."""
    try:
        call = call_of(body, context)
        caller = caller_of(request).name or body.sampling_session_id
        prepared = target.request(call.inputs, {}, caller, timeout_s=context.timeout_s(request))
    except RequestError as error:
        return RequestError(str(error))
    # The lease is the session's. Answers need no inputs.
    return replace(prepared, sampling_params=call.params, lease_s=None, return_inputs=False)


async def _patiently(sampler: Sampler, ids: list[str]) -> list[FutureResult]:
    """Collects results, for as long as a client waits."""
    try:
        return await sampler.client.call(HOLD_S, RouterAPI.collect, ids, HOLD_S)
    except (ServiceError, ConfigError):
        await asyncio.sleep(UNREACHABLE_PAUSE_S)
        raise


async def _answer(sampler: Sampler, result: FutureResult, allow_metadata_only: bool) -> Response:
    """Returns the answer for the state of a future. Raises GoneError if the client should sample anew."""
    if result.state == "unknown":
        raise GoneError(f"request {result.id!r} is not known, or not any more. Sample again.")
    if isinstance(result.error, REPEATED):
        await sampler.client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.forget, [result.id])
        raise GoneError(f"{result.error} Sample again.")
    if result.error is not None:
        return _failed(result.error)
    if result.response is None:
        return JSON({"type": "try_again", "request_id": result.id, "queue_state": "active"}, 408)
    try:
        encoded = sample_response(result.response, Wanted.unpacked(result.note))
    except TwinkleServeError as error:
        return _failed(error)
    if allow_metadata_only and len(encoded) > INLINE_BYTES:
        return JSON({"status": "complete_metadata", "response_payload_size": len(encoded)})
    return Response(encoded, media_type=PROTOBUF)


def _failed(error: TwinkleServeError) -> Response:
    """Returns the final answer of a call that failed."""
    user = isinstance(error, RequestError) and not isinstance(error, DeadlineError)
    return JSON({"error": str(error), "category": "user" if user else "server"})
