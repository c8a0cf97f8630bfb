"""Routes of `/v1/messages`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.data_format import SampledSequence
from twinkle_serve.data_format.sample_updates import CallBegun
from twinkle_serve.gateway.anthropic.answers import MessageEvents, content_of, end_of, header, new_id, usage
from twinkle_serve.gateway.anthropic.fields import CountTokensRequest, MessagesRequest
from twinkle_serve.gateway.bodies import read_model
from twinkle_serve.gateway.context import GatewayContext, caller_of, session_of
from twinkle_serve.gateway.conversations import Completion, Reply, ReplyDelta, TurnRequest, complete, stream
from twinkle_serve.gateway.documents import add_routes
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.openai.choices import end_of as sampled_of
from twinkle_serve.gateway.samplers import Sampler
from twinkle_serve.gateway.streaming import EventStream, event


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["Anthropic"])

    async def messages(request: Request) -> Response:
        body = await read_model(request, context.limits, MessagesRequest)
        target = await context.samplers.target(body.model)
        session = session_of(request, body.session_id)
        turn = body.turn(target, session, caller_of(request).name, context.timeout_s(request))
        if body.stream:
            return await EventStream.begin(events(body, turn), "anthropic")
        return JSON(await answer(body, turn, await complete(turn)))

    async def count_tokens(request: Request) -> Response:
        body = await read_model(request, context.limits, CountTokensRequest)
        target = await context.samplers.target(body.model)
        turn = body.turn(target, session_of(request, body.session_id), timeout_s=context.timeout_s(request))
        return JSON({"input_tokens": await turn.count_tokens()})

    add_routes(router, "/v1/messages", messages, "Continue a conversation", MessagesRequest)
    add_routes(router, "/v1/messages/count_tokens", count_tokens, "Count the tokens of a prompt", CountTokensRequest)
    return router


async def answer(body: MessagesRequest, turn: TurnRequest, completion: Completion) -> dict[str, Any]:
    """Returns the body of an answer that is not streamed."""
    reply = completion.replies[0]
    model = reply.sequence.adapter or turn.target.model
    return {
        **header(new_id(), model, 0),
        "content": content_of(reply.message, prefill_of(turn)),
        **end_of(reply.finish, await stop_sequence_of(turn.target.sampler, reply.sequence, body.stop_sequences)),
        "usage": usage_of(completion),
        **own_fields(body, completion),
    }


async def events(body: MessagesRequest, turn: TurnRequest) -> AsyncGenerator[bytes, None]:
    """Yields the events of a streamed answer."""
    writer = MessageEvents(prefill_of(turn))
    async with aclosing(stream(turn)) as items:
        async for item in items:
            if isinstance(item, CallBegun):
                start = header(new_id(), item.adapter or turn.target.model, item.prompts.lengths[0])
                new = writer.begin(start)
            elif isinstance(item, ReplyDelta):
                new = writer.push(item.deltas, last=item.finish is not None)
            else:
                reply = item.replies[0]
                stop = await stop_sequence_of(turn.target.sampler, reply.sequence, body.stop_sequences)
                new = writer.end(end_of(reply.finish, stop), usage_of(item), own_fields(body, item))
            for each in new:
                yield event(each, each["type"])


def prefill_of(turn: TurnRequest) -> str:
    """Returns the text of the client's message that the reply continues."""
    return str(turn.messages[-1]["content"] or "") if turn.continue_final_message else ""


def usage_of(completion: Completion) -> dict[str, int]:
    """Returns the exact usage of a reply."""
    return usage(len(completion.prompt_ids), len(completion.replies[0].sequence.tokens))


def own_fields(body: MessagesRequest, completion: Completion) -> dict[str, Any]:
    """Returns the fields of a message that are not Anthropic's: what sampled it, and its tokens if asked for."""
    reply: Reply = completion.replies[0]
    fields = {key: value for key, value in sampled_of(reply.sequence).items() if key != "finish_reason"}
    if reply.node is not None:
        fields["node"] = reply.node
    if body.return_token_ids:
        fields |= {"prompt_token_ids": completion.prompt_ids, "token_ids": reply.sequence.tokens}
    return fields


async def stop_sequence_of(sampler: Sampler, sequence: SampledSequence, stops: Sequence[str] | None) -> str | None:
    """Returns the stop sequence that a sample ended with: the one that its tokens have behind its text."""
    if not stops or sequence.stop_reason != "stop":
        return None
    whole, text = await sampler.decode(sequence.tokens), sequence.whole_text
    rest = whole[len(text) :] if whole.startswith(text) else ""
    return next((stop for stop in stops if rest.startswith(stop)), None)
