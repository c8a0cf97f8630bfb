"""`/weights`: the labels of the current ones, and new ones."""

from __future__ import annotations

import asyncio
import contextlib

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve import timing
from twinkle_serve.data_format.weights import PAUSE_MODES
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.gateway.bodies import body_pieces
from twinkle_serve.gateway.context import GatewayContext, caller_of
from twinkle_serve.gateway.documents import described
from twinkle_serve.gateway.errors import InvalidRequestError, MediaTypeError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.keys import require_scope
from twinkle_serve.gateway.native.media import JSON_MEDIA, TENSORS_MEDIA
from twinkle_serve.gateway.native.schemas import LABELS, STRING, STRINGS, object_of
from twinkle_serve.gateway.queries import choice_of, number_of, refuse_query, sampler_of
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.weights_file import buckets_of

USE = ("mode", "track", "timeout_s", "sampler")
"""Parameters of a request for kept weights."""
REPLACE = (*USE, "allow_nonfinite", "durable")
"""Of one that brings weights."""


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["native"])
    of_weights = {JSON_MEDIA: object_of(weights=STRING)}
    of_all = {JSON_MEDIA: object_of(weights=STRING, tracks=LABELS, versions=STRINGS)}

    @router.get("/weights", **described("Labels of current and kept weights", answers=of_all, query=("sampler",)))
    async def weights(request: Request) -> Response:
        state = await context.samplers.named(sampler_of(request)).status()
        return JSON({"weights": state["weights"], "tracks": state["tracks"], "versions": state["weights_versions"]})

    @router.put(
        "/weights/{version}",
        **described(
            "Replace the model's own weights on all engines of a track",
            media=TENSORS_MEDIA,
            answers=of_weights,
            query=REPLACE,
        ),
    )
    async def replace(version: str, request: Request) -> Response:
        require_scope(caller_of(request), "admin")
        refuse_query(request, *REPLACE)
        mode, timeout_s = choice_of(request, "mode", PAUSE_MODES), _limit_of(request)
        allow_nonfinite = choice_of(request, "allow_nonfinite", ("false", "true")) == "true"
        durable = choice_of(request, "durable", ("true", "false")) == "true"
        track = request.query_params.get("track", "")
        client = context.samplers.named(request.query_params.get("sampler")).client
        media = request.headers.get("content-type", TENSORS_MEDIA).partition(";")[0].strip().lower()
        if media != TENSORS_MEDIA:
            raise MediaTypeError(f"content-type must be {TENSORS_MEDIA}, a safetensors file, got {media[:200]}.")
        buckets = buckets_of(
            body_pieces(request, context.limits),
            max_weight_bytes=context.limits.upload_bytes,
            allow_nonfinite=allow_nonfinite,
        )
        upload = await client.call(timeout_s, RouterAPI.begin_weights, version, mode, track=track, durable=durable)
        try:
            with client.sending() as sender:
                index = 0
                async for bucket in buckets:
                    argument = await asyncio.to_thread(sender.send, bucket)
                    await client.call(timeout_s, RouterAPI.append_weights, upload, index, argument)
                    index += 1
                # As of a call from Python: if publishing fails at its end, the engines go back within the same time.
                limit_s = 3 * timeout_s + timing.CONTROL_TIMEOUT_S
                label = await client.call(limit_s, RouterAPI.publish_weights, upload, mode, timeout_s)
        except BaseException:
            with contextlib.suppress(TwinkleServeError):  # a silent upload is given up by the router in time
                await client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.abandon_weights, upload)
            raise
        return JSON({"weights": label})

    @router.post(
        "/weights/{version}/use",
        **described("Make kept weights current on all engines of a track", answers=of_weights, query=USE),
    )
    async def use(version: str, request: Request) -> Response:
        require_scope(caller_of(request), "admin")
        refuse_query(request, *USE)
        mode, timeout_s = choice_of(request, "mode", PAUSE_MODES), _limit_of(request)
        track = request.query_params.get("track", "")
        client = context.samplers.named(request.query_params.get("sampler")).client
        limit_s = 3 * timeout_s + timing.CONTROL_TIMEOUT_S
        label = await client.call(limit_s, RouterAPI.use_weights, version, mode, timeout_s, track=track)
        return JSON({"weights": label})

    return router


def _limit_of(request: Request) -> float:
    """Returns the limit of each step of an update, seconds."""
    timeout_s = number_of(request, "timeout_s", timing.CONTROL_TIMEOUT_S)
    if timeout_s <= 0:
        raise InvalidRequestError(f"timeout_s must be above 0, got {timeout_s:g}.", "timeout_s")
    return timeout_s
