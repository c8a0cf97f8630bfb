"""`/encode`, `/count_tokens` and `/decode`: the sampler's own tokenizer and template. No engine is needed."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve import timing
from twinkle_serve.data_format.token_lists import TokenLists, read_token_ids
from twinkle_serve.gateway.bodies import read_model
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.documents import described
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.native.answers import dumps
from twinkle_serve.gateway.native.fields import DecodeBody, EncodeBody
from twinkle_serve.gateway.native.media import JSON_MEDIA, form_of
from twinkle_serve.gateway.native.schemas import INTS, object_of
from twinkle_serve.gateway.queries import refuse_query
from twinkle_serve.gateway.samplers import Sampler
from twinkle_serve.routing.api import RouterAPI


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["native"])
    lists = {JSON_MEDIA: object_of(token_ids={"type": "array", "items": INTS})}
    counts = {JSON_MEDIA: object_of(counts=INTS)}
    text = {"type": "string"}
    texts = {JSON_MEDIA: object_of(text={"oneOf": [text, {"type": "array", "items": text}]})}

    @router.post("/encode", **described("Token ids of inputs", body=EncodeBody, answers=lists))
    async def encode(request: Request) -> Response:
        sampler, inputs, options = await _encoding(context, request)
        ids = await sampler.client.call(timing.CONTROL_TIMEOUT_S, RouterAPI.encode, inputs, **options)
        return Response(dumps({"token_ids": [ids.array(i) for i in range(len(ids))]}), media_type=JSON_MEDIA)

    @router.post("/count_tokens", **described("Number of tokens of inputs", body=EncodeBody, answers=counts))
    async def count_tokens(request: Request) -> Response:
        sampler, inputs, options = await _encoding(context, request)
        numbers = await sampler.client.call(timing.CONTROL_TIMEOUT_S, RouterAPI.count_tokens, inputs, **options)
        return JSON({"counts": numbers})

    @router.post("/decode", **described("Texts of token ids", body=DecodeBody, answers=texts))
    async def decode(request: Request) -> Response:
        _check(request)
        body = await read_model(request, context.limits, DecodeBody)
        lists, single = read_token_ids(body.token_ids)
        text = await context.samplers.named(body.sampler).client.call(
            timing.CONTROL_TIMEOUT_S,
            RouterAPI.decode,
            lists[0] if single else TokenLists.of(lists),
            template=body.template,
            skip_special_tokens=body.skip_special_tokens,
        )
        return JSON({"text": text})

    return router


def _check(request: Request) -> None:
    refuse_query(request)
    form_of(request, ("json",))


async def _encoding(context: GatewayContext, request: Request) -> tuple[Sampler, Any, dict[str, Any]]:
    """Reads a request: the sampler, its inputs, and the options of the call."""
    _check(request)
    body = await read_model(request, context.limits, EncodeBody)
    context.require_prompts(len(body.input_list), 1, ("inputs", ""))
    sampler = context.samplers.named(body.sampler)
    names = ("template", "continue_final_message", "add_generation_prompt")
    return sampler, sampler.client.snapshot(body.inputs), {name: getattr(body, name) for name in names}
