"""`/sample` and `/score`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.errors import DeadlineError
from twinkle_serve.gateway.bodies import read_model
from twinkle_serve.gateway.context import GatewayContext, caller_of
from twinkle_serve.gateway.documents import described
from twinkle_serve.gateway.errors import Failure
from twinkle_serve.gateway.native.answers import dumps, prompts_of, to_json
from twinkle_serve.gateway.native.fields import OfAdapter, SampleBody, ScoreBody
from twinkle_serve.gateway.native.media import JSON_MEDIA, LINES_MEDIA, TENSORS_MEDIA, form_of
from twinkle_serve.gateway.native.schemas import LINE, SAMPLES
from twinkle_serve.gateway.native.tensors import to_tensors
from twinkle_serve.gateway.queries import refuse_query
from twinkle_serve.gateway.samplers import Target

LARGE_TOKENS = 20_000
"""Responses of more tokens are serialised in a thread: it takes 10 ms and more."""

ANSWERS = {
    JSON_MEDIA: SAMPLES,
    LINES_MEDIA: LINE,
    TENSORS_MEDIA: {"type": "string", "format": "binary"},
}


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["native"])

    @router.post("/sample", **described("Sample inputs", body=SampleBody, answers=ANSWERS))
    async def sample(request: Request) -> Response:
        form = _checked(request)
        body = await read_model(request, context.limits, SampleBody)
        context.require_prompts(len(body.input_list), body.most_samples, ("inputs", "num_samples"))
        target, call = _prepared(context, request, body, body.params())
        return await _answer(request, target, call, form)

    @router.post("/score", **described("Logprobs of given sequences", body=ScoreBody, answers=ANSWERS))
    async def score(request: Request) -> Response:
        form = _checked(request)
        body = await read_model(request, context.limits, ScoreBody)
        context.require_prompts(len(body.input_list), 1, ("inputs", ""))
        params = {"max_tokens": 0, "logprobs": None, "prompt_logprobs": body.top_logprobs, "num_samples": 1}
        target, call = _prepared(context, request, body, params)
        return await _answer(request, target, call, form)

    return router


def _checked(request: Request) -> str:
    refuse_query(request)
    return form_of(request)


def _prepared(context: GatewayContext, request: Request, body: OfAdapter, params: Any) -> tuple[Target, SampleRequest]:
    sampler = context.samplers.named(body.sampler)
    target = Target(sampler.name, sampler, body.adapter_name)
    timeout_s = context.timeout_s(request) if body.timeout_s is None else body.timeout_s
    call = target.request(body.inputs, params, caller_of(request).name, timeout_s=timeout_s, **body.options())
    return target, call


async def _answer(request: Request, target: Target, call: SampleRequest, form: str) -> Response:
    if form == "lines":
        return await _lines(target, call)
    try:
        response = await target.run(call)
    except DeadlineError as error:
        if error.response is None:
            raise
        return _late(error, error.response)
    if form == "tensors":
        return Response(await _packed(to_tensors, response), media_type=TENSORS_MEDIA)
    return Response(await _packed(to_json, response), media_type=JSON_MEDIA)


async def _packed(pack: Any, response: SampleResponse) -> bytes:
    tokens = len(response.columns.tokens) + sum(len(scores.logprobs) for scores in response.columns.scores.values())
    data: bytes = await asyncio.to_thread(pack, response) if tokens > LARGE_TOKENS else pack(response)
    return data


def _late(error: DeadlineError, response: SampleResponse) -> Response:
    """Answers a call that was not complete at its deadline: the error, and the prompts that were."""
    failure = Failure.of(error)
    body = dumps(failure.body("native"))[:-1] + b',"response":' + to_json(response) + b"}"
    return Response(body, failure.status, failure.headers, JSON_MEDIA)


async def _lines(target: Target, call: SampleRequest) -> Response:
    """Answers with a line for each prompt as it finishes. An error before the first has a status of its own."""
    parts = target.run_iter(call)
    try:
        first = await anext(parts, None)
    except BaseException:
        await parts.aclose()
        raise
    return StreamingResponse(_each_line(first, parts), media_type=LINES_MEDIA)


async def _each_line(
    first: SampleResponse | None, parts: AsyncGenerator[SampleResponse, None]
) -> AsyncGenerator[bytes, None]:
    count = 0
    async with contextlib.aclosing(parts):
        try:
            part = first
            while part is not None:
                for prompt in prompts_of(part):
                    count += 1
                    yield dumps({"prompt": prompt}) + b"\n"
                part = await anext(parts, None)
        except Exception as error:
            yield dumps(Failure.of(error).body("native")) + b"\n"
            return
    yield dumps({"done": {"prompts": count}}) + b"\n"
