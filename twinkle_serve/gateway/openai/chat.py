"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.data_format.message_stream import ContentDelta, MessageDelta, ReasoningDelta, ToolCallBegin
from twinkle_serve.data_format.sample_updates import CallBegun
from twinkle_serve.gateway.bodies import Body, read_model
from twinkle_serve.gateway.context import GatewayContext, caller_of, session_of
from twinkle_serve.gateway.conversations import (
    Completion,
    ForcedCall,
    Reply,
    ReplyDelta,
    TurnRequest,
    complete,
    message_dict,
    messages_of,
    stream,
)
from twinkle_serve.gateway.documents import add_routes
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.openai.choices import Header, end_of, usage, usage_of
from twinkle_serve.gateway.openai.fields import SamplingFields
from twinkle_serve.gateway.openai.logprobs import TokenNames, chat_logprobs, positions_of, positions_of_update
from twinkle_serve.gateway.samplers import Target
from twinkle_serve.gateway.streaming import DONE, EventStream, event


class Function(Body):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments are held to the schema where `tool_choice` forces the call; else this has no effect."""


class Tool(Body):
    """One of `tools`."""

    type: Literal["function"] = "function"
    function: Function

    def as_dict(self) -> dict[str, Any]:
        """Returns it as the template reads it."""
        function = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": "function", "function": function}


class NamedFunction(Body):
    """`function` of a tool choice."""

    name: str


class NamedTool(Body):
    """`tool_choice` that names a function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(SamplingFields):
    """Body of a request."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def sampling(self) -> dict[str, Any]:
        params = super().sampling()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true.", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequestError(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} contradict each "
                "other. Drop one.",
                "max_tokens",
            )
        if self.add_generation_prompt == self.continue_final_message:
            raise InvalidRequestError(
                "exactly one of add_generation_prompt and continue_final_message must be true.", "add_generation_prompt"
            )
        if (limit := self.max_completion_tokens or self.max_tokens) is not None:
            params["max_tokens"] = limit
        return params | {"logprobs": self.top_logprobs if self.logprobs else None}

    def forced(self) -> ForcedCall | None:
        """Returns the call that `tool_choice` forces. Raises InvalidRequestError if there is no such tool."""
        choice, functions = self.tool_choice, [tool.function.model_dump() for tool in self.tools or ()]
        if choice in (None, "none", "auto"):
            return None
        if not functions:
            raise InvalidRequestError("tool_choice needs tools.", "tool_choice")
        if isinstance(choice, NamedTool):
            name = choice.function.name
            if name not in (known := [function["name"] for function in functions]):
                raise InvalidRequestError(f"tool_choice names {name!r}; tools has {', '.join(known)}.", "tool_choice")
            return ForcedCall(functions, name)
        return ForcedCall(functions, once=not self.parallel_tool_calls)

    def turn(self, target: Target, session: str | None, caller: str, timeout_s: float | None) -> TurnRequest:
        """Returns the turn that it asks for."""
        return TurnRequest(
            session=session,
            target=target,
            messages=messages_of(self.messages),
            tools=[tool.as_dict() for tool in self.tools or ()],
            params=self.sampling(),
            forced=self.forced(),
            parse_tools=self.tool_choice != "none",
            one_call=not self.parallel_tool_calls,
            continue_final_message=self.continue_final_message,
            caller=caller,
            timeout_s=timeout_s,
        )


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    async def chat(request: Request) -> Response:
        body = await read_model(request, context.limits, ChatRequest)
        context.require_prompts(1, body.n)
        target = await context.samplers.target(body.model)
        session = session_of(request, body.session_id)
        turn = body.turn(target, session, caller_of(request).name, context.timeout_s(request))
        if body.stream:
            return await EventStream.begin(chunks(body, turn), "openai")
        return JSON(await answer(body, turn, await complete(turn)))

    add_routes(router, "/v1/chat/completions", chat, "Continue a conversation", ChatRequest)
    return router


async def answer(body: ChatRequest, turn: TurnRequest, completion: Completion) -> dict[str, Any]:
    """Returns the body of an answer that is not streamed."""
    every = [positions_of(reply.sequence) for reply in completion.replies] if body.logprobs else []
    names = await TokenNames.of(
        turn.target.sampler, [position for each in every for position in each], body.return_tokens_as_token_ids
    )
    choices = []
    for i, reply in enumerate(completion.replies):
        choice = {"index": i, "message": _message(reply), **end_of(reply.sequence), "finish_reason": reply.finish}
        if reply.node is not None:
            choice["node"] = reply.node
        choice["logprobs"] = {"content": chat_logprobs(every[i], names, body.top_logprobs)} if body.logprobs else None
        if body.return_token_ids:
            choice["token_ids"] = reply.sequence.tokens
        choices.append(choice)
    extra = {"prompt_token_ids": completion.prompt_ids} if body.return_token_ids else {}
    header = Header.of("chatcmpl", "chat.completion", turn.target, completion.response)
    return {**header.fields(), "choices": choices, "usage": usage_of(completion.response), **extra}


def _message(reply: Reply) -> dict[str, Any]:
    message = message_dict(reply.message) | {"refusal": None}
    if reply.message.reasoning:
        message["reasoning"] = reply.message.reasoning
    return message


async def chunks(body: ChatRequest, turn: TurnRequest) -> AsyncGenerator[bytes, None]:
    """Yields the events of a streamed answer."""
    options = body.stream_options
    with_usage, usage_so_far = (
        (False, False)
        if options is None
        else (
            options.include_usage,
            options.continuous_usage_stats,
        )
    )
    header: Header | None = None
    prompt_tokens, tokens = 0, 0
    async with aclosing(stream(turn)) as events:
        async for item in events:
            if isinstance(item, CallBegun):
                header = Header.begun("chatcmpl", "chat.completion.chunk", turn.target, item)
                prompt_tokens = item.prompts.lengths[0]
                for i in range(item.num_samples[0]):
                    extra = {"prompt_token_ids": item.prompts.array(0).tolist()} if body.return_token_ids else {}
                    chunk = _chunk(header, [_choice(i, {"role": "assistant", "content": ""})], extra)
                    yield event(chunk | ({"usage": usage(prompt_tokens, 0)} if usage_so_far else {}))
            elif isinstance(item, ReplyDelta):
                assert header is not None
                tokens += len(item.update.tokens)
                choices = await _choices(body, turn, item)
                for choice in choices:
                    extra = {"usage": usage(prompt_tokens, tokens)} if usage_so_far else {}
                    yield event(_chunk(header, [choice], extra))
            elif with_usage:
                assert header is not None
                yield event(_chunk(header, [], {"usage": usage_of(item.response)}))
    yield DONE


async def _choices(body: ChatRequest, turn: TurnRequest, item: ReplyDelta) -> Sequence[Mapping[str, Any]]:
    """Returns the choices of a delta: one for each kind of content, the first of them with the tokens."""
    deltas = [_delta(each) for each in item.deltas]
    if not deltas and item.finish is None and not (body.logprobs or body.return_token_ids):
        return []  # its tokens have no text yet
    choices = [_choice(item.sample, delta) for delta in deltas or [{}]]
    if body.logprobs and len(item.update.tokens):
        positions = positions_of_update(item.update)
        names = await TokenNames.of(turn.target.sampler, positions, body.return_tokens_as_token_ids)
        choices[0]["logprobs"] = {"content": chat_logprobs(positions, names, body.top_logprobs)}
    if body.return_token_ids:
        choices[0]["token_ids"] = item.update.tokens.tolist()
    if item.finish is not None:
        choices[-1]["finish_reason"] = item.finish
    return choices


def _choice(index: int, delta: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _chunk(header: Header, choices: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> dict[str, Any]:
    return {**header.fields(), "choices": choices, **extra}


def _delta(delta: MessageDelta) -> dict[str, Any]:
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, ReasoningDelta):
        return {"reasoning_content": delta.text, "reasoning": delta.text}
    call: dict[str, Any] = {"index": delta.index}
    if isinstance(delta, ToolCallBegin):
        call |= {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
    else:
        call["function"] = {"arguments": delta.text}
    return {"tool_calls": [call]}
