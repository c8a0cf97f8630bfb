"""The models that clients can name, in OpenAI's form or in Anthropic's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
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

ANTHROPIC_HEADER = "anthropic-version"
"""Clients of Anthropic's protocol send it."""


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models", summary="Each sampler, each adapter and each version of it")
    async def models(request: Request) -> Response:
        known = await context.samplers.models()
        if ANTHROPIC_HEADER in request.headers:
            return JSON(_anthropic_list(known))
        return JSON({"object": "list", "data": [_as_dict(model) for model in known]})

    @router.get("/v1/models/{model:path}", summary="One model")
    async def model(model: str, request: Request) -> Response:
        known = {each.id: each for each in await context.samplers.models()}
        if model not in known:
            raise UnknownModelError(unknown_name("model", model, known) + ".", "model")
        as_dict = _as_anthropic if ANTHROPIC_HEADER in request.headers else _as_dict
        return JSON(as_dict(known[model]))

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


def _anthropic_list(models: Sequence[Model]) -> dict[str, Any]:
    ids = [model.id for model in models]
    return {
        "data": [_as_anthropic(model) for model in models],
        "has_more": False,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


def _as_anthropic(model: Model) -> dict[str, Any]:
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.id,
        "created_at": datetime.fromtimestamp(STARTED, UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": model.max_model_len,
        "max_tokens": model.max_model_len,
    }
