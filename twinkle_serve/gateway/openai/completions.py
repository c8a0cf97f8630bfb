"""`/v1/completions`: text or token ids in, text out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.sample_updates import CallBegun, SampleUpdate
from twinkle_serve.gateway.bodies import read_model
from twinkle_serve.gateway.context import GatewayContext, caller_of, session_of
from twinkle_serve.gateway.conversations import HOLD_S
from twinkle_serve.gateway.documents import add_routes
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.openai.choices import Header, end_of, usage, usage_of
from twinkle_serve.gateway.openai.fields import SamplingFields, StreamOptions
from twinkle_serve.gateway.openai.logprobs import (
    Position,
    TokenNames,
    completion_logprobs,
    positions_of,
    positions_of_prompt,
    positions_of_update,
)
from twinkle_serve.gateway.samplers import Target
from twinkle_serve.gateway.streaming import DONE, EventStream, event
from twinkle_serve.sessions import Conversation, SessionTurn

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(SamplingFields):
    """Body of a request."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=0)
    logprobs: int | None = Field(default=None, ge=0)
    echo: bool = False
    add_special_tokens: bool = True

    def inputs(self) -> list[dict[str, Any]]:
        """Returns the prompts as inputs of a call. Raises InvalidRequestError."""
        prompt = self.prompt
        if isinstance(prompt, str):
            prompts: Sequence[Any] = [prompt]
        elif not prompt:
            raise InvalidRequestError("prompt is empty. Give a text, token ids, or a list of either.", "prompt")
        else:
            prompts = [prompt] if isinstance(prompt[0], int) else prompt
        special = {} if self.add_special_tokens else {"add_special_tokens": False}
        return [{"text": each, **special} if isinstance(each, str) else {"input_ids": each} for each in prompts]

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

    async def completions(request: Request) -> Response:
        body = await read_model(request, context.limits, CompletionRequest)
        inputs = body.inputs()
        context.require_prompts(len(inputs), body.n)
        target = await context.samplers.target(body.model)
        timeout_s = context.timeout_s(request)
        place = await Place.find(target, session_of(request, body.session_id), inputs, timeout_s)
        params = body.sampling()
        if place is not None:
            inputs = [place.input]
            params["logprobs"] = params["logprobs"] or 0  # trajectories have them
        call = target.request(inputs, params, caller_of(request).name, timeout_s=timeout_s)
        if body.stream:
            return await EventStream.begin(chunks(body, target, call, place), "openai")
        response = await target.run(call)
        nodes = None if place is None else await place.append(response)
        return JSON(await answer(body, target, response, nodes))

    add_routes(router, "/v1/completions", completions, "Complete prompts", CompletionRequest)
    return router


@dataclass(frozen=True, slots=True)
class Place:
    """Of the only prompt of a request in its session."""

    session: str
    target: Target
    turn: SessionTurn
    input: dict[str, Any]

    @classmethod
    async def find(
        cls, target: Target, session: str | None, inputs: Sequence[Mapping[str, Any]], timeout_s: float | None
    ) -> Place | None:
        """Finds it; None without a session. Raises InvalidRequestError if there are several prompts."""
        if session is None:
            return None
        if len(inputs) != 1:
            raise InvalidRequestError(f"a request of a session has one prompt, got {len(inputs)}.", "prompt")
        text = inputs[0].get("text")
        conversation = Conversation.of_ids(inputs[0]["input_ids"]) if text is None else Conversation.of_text(text)
        found = await target.sampler.sessions.find_turn(session, conversation.query, hold_s=timeout_s or HOLD_S)
        turn = SessionTurn(conversation, found)
        if text is None:
            return cls(session, target, turn, turn.input)
        rest = {"text": turn.rest, "add_special_tokens": found.node is None}
        ids = await target.sampler.encode(rest) if turn.rest or found.node is None else []
        return cls(session, target, turn, turn.input_after(ids))

    async def append(self, response: SampleResponse) -> Sequence[int]:
        """Adds the samples to the session. Returns their nodes."""
        texts = [await self.target.sampler.decode(sequence.tokens) for sequence in response.sequences]
        return await self.target.sampler.sessions.append_turn(self.session, self.turn.record(response, texts=texts))


async def answer(
    body: CompletionRequest, target: Target, response: SampleResponse, nodes: Sequence[int] | None = None
) -> dict[str, Any]:
    """Returns the body of an answer that is not streamed.

    Args:
        nodes: of the samples in their session.
    """
    with_logprobs = body.logprobs is not None
    scored = [_scored(response, i) for i in range(len(response))] if body.echo and with_logprobs else []
    sampled = [positions_of(sequence) for sequence in response.sequences] if with_logprobs else []
    every = [*(position for each in scored for position in each), *(p for each in sampled for p in each)]
    names = await TokenNames.of(target.sampler, every, body.return_tokens_as_token_ids)
    echoed = await _echoed(body, target, [ids.tolist() for ids in response.prompts]) if body.echo else []
    choices = []
    for row, (sequence, prompt) in enumerate(zip(response.sequences, response.columns.group.tolist(), strict=True)):
        text = echoed[prompt] + sequence.decoded if body.echo else sequence.decoded
        choice = {"index": row, "text": text, "logprobs": None, **end_of(sequence)}
        if body.logprobs is not None:
            positions = [*(scored[prompt] if scored else ()), *sampled[row]]
            choice["logprobs"] = completion_logprobs(positions, names, body.logprobs)
        if body.return_token_ids:
            choice["token_ids"] = sequence.tokens
            choice["prompt_token_ids"] = response.prompts[prompt].tolist()
        if nodes is not None:
            choice["node"] = nodes[row]
        choices.append(choice)
    header = Header.of("cmpl", "text_completion", target, response)
    return {**header.fields(), "choices": choices, "usage": usage_of(response)}


async def chunks(
    body: CompletionRequest, target: Target, call: SampleRequest, place: Place | None
) -> AsyncGenerator[bytes, None]:
    """Yields the events of a streamed answer."""
    if body.echo and body.logprobs is not None:
        raise InvalidRequestError("echo with logprobs cannot be streamed. Drop one of the three.", "stream")
    options = body.stream_options or StreamOptions()
    header: Header | None = None
    prompt_tokens = tokens = 0
    offsets: dict[tuple[int, int], int] = {}
    async with aclosing(target.run_updates(call)) as items:
        async for item in items:
            if isinstance(item, CallBegun):
                header = Header.begun("cmpl", "text_completion", target, item)
                prompt_tokens = sum(item.prompts.lengths)
                async for chunk in _first_chunks(body, target, header, item):
                    yield chunk
                continue
            assert header is not None
            if isinstance(item, SampleResponse):
                if place is not None:
                    await place.append(item)
                continue
            for update in item:
                tokens += len(update.tokens)
                choice = await _choice_of(body, target, update, offsets)
                if choice is not None:
                    extra = {"usage": usage(prompt_tokens, tokens)} if options.continuous_usage_stats else {}
                    yield event({**header.fields(), "choices": [choice], **extra})
    if options.include_usage:
        assert header is not None
        yield event({**header.fields(), "choices": [], "usage": usage(prompt_tokens, tokens)})
    yield DONE


async def _first_chunks(
    body: CompletionRequest, target: Target, header: Header, begun: CallBegun
) -> AsyncGenerator[bytes, None]:
    """Yields what is known of each choice before it is sampled: its prompt, if the client asked for that."""
    if not (body.echo or body.return_token_ids):
        return
    prompts = [begun.prompts.array(i).tolist() for i in range(len(begun.prompt_indices))]
    echoed = await _echoed(body, target, prompts) if body.echo else [""] * len(prompts)
    for i, (ids, text) in enumerate(zip(prompts, echoed, strict=True)):
        for j in range(body.n):
            choice = {"index": i * body.n + j, "text": text, "logprobs": None, "finish_reason": None}
            if body.return_token_ids:
                choice |= {"prompt_token_ids": ids, "token_ids": []}
            yield event({**header.fields(), "choices": [choice]})


async def _choice_of(
    body: CompletionRequest, target: Target, update: SampleUpdate, offsets: dict[tuple[int, int], int]
) -> dict[str, Any] | None:
    """Returns the choice of an update; None if it says nothing yet.

    Args:
        offsets: length of the text of each sample's tokens so far; advanced by this.
    """
    if not update.text and update.stop_reason is None and body.logprobs is None and not body.return_token_ids:
        return None
    choice: dict[str, Any] = {
        "index": update.prompt_index * body.n + update.sample,
        "text": update.text,
        "logprobs": None,
        "finish_reason": update.stop_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = update.tokens.tolist()
    if body.logprobs is not None:
        positions = positions_of_update(update)
        names = await TokenNames.of(target.sampler, positions, body.return_tokens_as_token_ids)
        key = (update.prompt_index, update.sample)
        choice["logprobs"] = completion_logprobs(positions, names, body.logprobs, offsets.get(key, 0))
        offsets[key] = offsets.get(key, 0) + sum(map(len, choice["logprobs"]["tokens"]))
    return choice


def _scored(response: SampleResponse, prompt: int) -> list[Position | None]:
    ids = response.prompts[prompt].tolist()
    positions = positions_of_prompt(ids, response.columns.scores[prompt])
    return [[(ids[0], float("nan"))] if position is None else position for position in positions]


async def _echoed(body: CompletionRequest, target: Target, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Returns the text of each prompt.

    Args:
        prompts: their token ids.
    """
    if isinstance(body.prompt, str):
        return [body.prompt]
    if isinstance(body.prompt[0], str):
        return [str(text) for text in body.prompt]
    return [await target.sampler.decode(ids) for ids in prompts]
