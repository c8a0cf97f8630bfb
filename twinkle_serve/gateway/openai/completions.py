"""`/v1/completions`: text or token ids in, text out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.data_format import SampledSequence, SampleResponse
from twinkle_serve.gateway.bodies import read_model
from twinkle_serve.gateway.context import GatewayContext, caller_of
from twinkle_serve.gateway.documents import json_body
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.openai.fields import SamplingFields
from twinkle_serve.gateway.openai.logprobs import (
    Position,
    TokenNames,
    completion_logprobs,
    positions_of,
    positions_of_prompt,
)
from twinkle_serve.gateway.samplers import Target

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(SamplingFields):
    """Body of a request."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=0)
    logprobs: int | None = Field(default=None, ge=0)
    echo: bool = False

    def inputs(self) -> list[dict[str, Any]]:
        """Returns the prompts as inputs of a call. Raises InvalidRequestError."""
        prompt = self.prompt
        if isinstance(prompt, str):
            prompts: Sequence[Any] = [prompt]
        elif not prompt:
            raise InvalidRequestError("prompt is empty. Give a text, token ids, or a list of either.", "prompt")
        else:
            prompts = [prompt] if isinstance(prompt[0], int) else prompt
        return [{"text": each} if isinstance(each, str) else {"input_ids": each} for each in prompts]

    def sampling(self) -> dict[str, Any]:
        params = super().sampling()
        params |= {"max_tokens": self.max_tokens, "logprobs": self.logprobs}
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError(
                "max_tokens=0 samples nothing. Raise it, or set echo to get the prompt.", "max_tokens"
            )
        if self.echo and self.logprobs is not None:
            params.setdefault("prompt_logprobs", self.logprobs)
        return params


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", summary="Complete prompts", openapi_extra=json_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await read_model(request, context.limits, CompletionRequest)
        inputs = body.inputs()
        context.require_prompts(len(inputs), body.n)
        target = await context.samplers.target(body.model)
        call = target.request(inputs, body.sampling(), caller_of(request).name, timeout_s=context.timeout_s(request))
        response = await target.run(call)
        return JSON(await answer(body, target, response))

    return router


async def answer(body: CompletionRequest, target: Target, response: SampleResponse) -> dict[str, Any]:
    """Returns the body of an answer that is not streamed."""
    scored = [_scored(response, i) for i in range(len(response))] if body.echo and body.logprobs is not None else []
    sampled = [positions_of(sequence) for sequence in response.sequences] if body.logprobs is not None else []
    every = [*(position for each in scored for position in each), *(p for each in sampled for p in each)]
    names = await TokenNames.of(target.sampler, every, body.return_tokens_as_token_ids)
    echoed = await _echoed(body, target, response) if body.echo else []
    choices = []
    for row, sequence in enumerate(response.sequences):
        prompt = int(response.columns.group[row])
        choice = {"index": row, "text": sequence.decoded, **end_of(sequence)}
        positions: list[Position | None] = []
        if body.echo:
            choice["text"] = echoed[prompt] + sequence.decoded
            positions += scored[prompt] if scored else []
        if body.logprobs is not None:
            positions += sampled[row]
            choice["logprobs"] = completion_logprobs(positions, names, body.logprobs)
        else:
            choice["logprobs"] = None
        if body.return_token_ids:
            choice["token_ids"] = sequence.tokens
            choice["prompt_token_ids"] = response.prompts[prompt].tolist()
        choices.append(choice)
    return {
        **Header.of("cmpl", "text_completion", target, response).fields(),
        "choices": choices,
        "usage": usage_of(response),
    }


def _scored(response: SampleResponse, prompt: int) -> list[Position | None]:
    ids = response.prompts[prompt].tolist()
    positions = positions_of_prompt(ids, response.columns.scores[prompt])
    return [[(ids[0], float("nan"))] if position is None else position for position in positions]


async def _echoed(body: CompletionRequest, target: Target, response: SampleResponse) -> list[str]:
    """Returns the text of each prompt."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    if isinstance(body.prompt[0], str):
        return [str(text) for text in body.prompt]
    return [await target.sampler.decode(ids.tolist()) for ids in response.prompts]


@dataclass(frozen=True, slots=True)
class Header:
    """The fields with which every answer and every chunk of a stream begins."""

    id: str
    object: str
    created: int
    model: str
    weights: str
    """Label of the weights that sampled it last."""

    @classmethod
    def of(cls, prefix: str, kind: str, target: Target, response: SampleResponse) -> Header:
        return cls(
            id=f"{prefix}-{uuid.uuid4().hex}",
            object=kind,
            created=int(time.time()),
            model=(response.columns.adapter[0] if len(response.columns) else "") or target.model,
            weights=response.columns.weight_versions[0][-1][0] if len(response.columns) else "",
        )

    def fields(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.weights,
        }


def end_of(sequence: SampledSequence) -> dict[str, Any]:
    """Returns the fields of a finished choice: why it ended, and what sampled it."""
    return {
        "finish_reason": sequence.stop_reason,
        "seed": sequence.seed,
        "adapter": sequence.adapter or None,
        "weight_versions": [
            {"version": label, "start": start, "end": end} for label, start, end in sequence.weight_versions
        ],
    }


def usage_of(response: SampleResponse) -> Mapping[str, Any]:
    """Returns the exact usage: each prompt once, each sampled token."""
    prompt = sum(len(ids) for ids in response.prompts)
    completion = len(response.columns.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
