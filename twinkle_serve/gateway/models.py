"""The models that clients can name, in OpenAI's form."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.errors import unknown_name
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.errors import UnknownModelError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.samplers import Model

STARTED = int(time.time())


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models", summary="Each sampler, each adapter and each version of it")
    async def models(request: Request) -> Response:
        return JSON({"object": "list", "data": [_as_dict(model) for model in await context.samplers.models()]})

    @router.get("/v1/models/{model:path}", summary="One model")
    async def model(model: str, request: Request) -> Response:
        known = {each.id: each for each in await context.samplers.models()}
        if model not in known:
            raise UnknownModelError(unknown_name("model", model, known) + ".", "model")
        return JSON(_as_dict(known[model]))

    return router


def _as_dict(model: Model) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": STARTED,
        "owned_by": "twinkle-serve",
        "root": model.root,
        "parent": model.parent,
        "max_model_len": model.max_model_len,
    }
