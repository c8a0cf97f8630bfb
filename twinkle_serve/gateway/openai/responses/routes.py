"""Routes of `/v1/responses`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from twinkle_serve.data_format.sample_updates import CallBegun
from twinkle_serve.gateway.bodies import read_model
from twinkle_serve.gateway.context import SESSION_PREFIXES, GatewayContext, caller_of, session_of
from twinkle_serve.gateway.conversations import (
    Completion,
    ReplyDelta,
    TurnRequest,
    complete,
    deltas_of,
    stream,
)
from twinkle_serve.gateway.documents import add_routes
from twinkle_serve.gateway.errors import ConflictError, Failure, InvalidRequestError, NotFoundError
from twinkle_serve.gateway.json_response import JSON
from twinkle_serve.gateway.openai.logprobs import (
    Position,
    TokenNames,
    chat_logprobs,
    positions_of,
    positions_of_update,
)
from twinkle_serve.gateway.openai.responses.answers import (
    StoredResponse,
    begun,
    ended,
    failed,
    note_of,
    sampled_fields,
    status_of,
)
from twinkle_serve.gateway.openai.responses.fields import ResponsesRequest
from twinkle_serve.gateway.openai.responses.ids import ResponseId, new_session
from twinkle_serve.gateway.openai.responses.output import Event, OutputWriter
from twinkle_serve.gateway.samplers import Sampler, Samplers, Target
from twinkle_serve.gateway.streaming import EventStream, event


def routes(context: GatewayContext) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    async def responses(request: Request) -> Response:
        body = await read_model(request, context.limits, ResponsesRequest)
        target = await context.samplers.target(body.model)
        session = session_of(request, body.session_id)
        timeout_s = context.timeout_s(request)
        call = await ResponseCall.prepare(context.samplers, target, body, session, caller_of(request).name, timeout_s)
        if body.stream:
            return await EventStream.begin(call.events(), "openai")
        return JSON(await call.answer(await complete(call.turn)))

    async def response(response_id: str, request: Request) -> Response:
        _refuse_options(request)
        place = _place(request, response_id)
        stored = await StoredResponse.find(context.samplers.named(place.sampler), place)
        return JSON(stored.answer())

    async def delete(response_id: str, request: Request) -> Response:
        place = _place(request, response_id)
        sampler = context.samplers.named(place.sampler)
        await StoredResponse.find(sampler, place)
        if not place.has_own_session:
            raise ConflictError(
                f"the response is part of the session {place.session!r}. Delete the session to delete its turns."
            )
        assert place.session is not None
        await sampler.sessions.end_session(place.session)
        return JSON({"id": response_id, "object": "response", "deleted": True})

    add_routes(router, "/v1/responses", responses, "Make a response", ResponsesRequest)
    for prefix in SESSION_PREFIXES:
        path, suffix = f"{prefix}/v1/responses/{{response_id}}", "_of_session" if prefix else ""
        router.add_api_route(path, response, summary="A stored response", name=f"response{suffix}")
        router.add_api_route(
            path,
            delete,
            methods=["DELETE"],
            summary="Delete a stored response, and those of its conversation",
            name=f"delete_response{suffix}",
        )
    return router


def _place(request: Request, response_id: str) -> ResponseId:
    """Reads the id of a stored response. Raises NotFoundError, also if the path names another session."""
    place = ResponseId.parse(response_id)
    if request.path_params.get("session", place.session) != place.session:
        raise NotFoundError(f"the session has no response {response_id!r:.100}.")
    return place


def _refuse_options(request: Request) -> None:
    """Raises InvalidRequestError for options that are not supported."""
    for name, value in request.query_params.items():
        if (name, value) != ("stream", "false"):
            raise InvalidRequestError(f"{name} is not supported for a stored response. Leave it out.", name)


@dataclass(frozen=True, slots=True)
class ResponseCall:
    """A request, ready to be sampled."""

    body: ResponsesRequest
    id: ResponseId
    turn: TurnRequest
    response: dict[str, Any]
    """The response as it begins."""

    @classmethod
    async def prepare(
        cls,
        samplers: Samplers,
        target: Target,
        body: ResponsesRequest,
        session: str | None,
        caller: str,
        timeout_s: float | None,
    ) -> ResponseCall:
        """Finds the previous response, and the session: that of the request, of the previous response, or, to be
        stored in, one of its own.

        Raises:
            NotFoundError: there is no such previous response.
            InvalidRequestError: it is of another session or sampler, or a field is invalid.
        """
        before: Sequence[dict[str, Any]] = ()
        if body.previous_response_id is not None:
            previous = ResponseId.parse(body.previous_response_id)
            before = (await StoredResponse.find(_sampler_of(samplers, target, previous), previous)).messages()
            if session not in (None, previous.session):
                raise InvalidRequestError(
                    f"the previous response is of the session {previous.session!r}, the request of {session!r}. Leave "
                    "one of them out.",
                    "previous_response_id",
                )
            session = previous.session
        if session is None and body.store:
            session = new_session()
        response_id = ResponseId.new(target.sampler.name, session)
        response = begun(body, response_id, target.model)
        functions = body.functions()
        turn = TurnRequest(
            target=target,
            messages=body.conversation(before),
            tools=functions,
            params=body.sampling(),
            forced=body.forced(functions),
            parse_tools=body.tool_choice != "none",
            one_call=not body.parallel_tool_calls,
            session=session,
            turn_id=response_id.turn,
            note=note_of(response) if session is not None else "",
            caller=caller,
            timeout_s=timeout_s,
        )
        return cls(body, response_id, turn, response)

    async def answer(self, completion: Completion) -> dict[str, Any]:
        """Returns the body of an answer that is not streamed."""
        reply = completion.replies[0]
        writer = OutputWriter(self.id)
        writer.push(deltas_of(reply.message), await self._logprobs(positions_of(reply.sequence)))
        writer.end(status_of(reply.sequence.stop_reason))
        return self._ended(completion, writer)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yields the events of a streamed answer. An error after the first of them is an event, too."""
        number = 0
        async with aclosing(self._events()) as items:
            async for item in items:
                yield event(item | {"sequence_number": number}, item["type"])
                number += 1

    async def _events(self) -> AsyncGenerator[Event, None]:
        response: dict[str, Any] | None = None
        writer = OutputWriter(self.id)
        try:
            async with aclosing(stream(self.turn)) as events:
                async for item in events:
                    if isinstance(item, CallBegun):
                        response = self.response | {"model": item.adapter or self.response["model"]}
                        for name in ("created", "in_progress"):
                            yield {"type": f"response.{name}", "response": response}
                    elif isinstance(item, ReplyDelta):
                        logprobs = await self._logprobs(positions_of_update(item.update))
                        for each in writer.push(item.deltas, logprobs):
                            yield each
                    else:
                        status = status_of(item.replies[0].sequence.stop_reason)
                        for each in writer.end(status):
                            yield each
                        yield {"type": f"response.{status}", "response": self._ended(item, writer)}
        except Exception as error:
            if response is None:
                raise
            failure = Failure.of(error)
            fields = {"code": failure.kind, "message": failure.message, "param": failure.param}
            yield {"type": "error", **fields}
            yield {"type": "response.failed", "response": failed(response, failure)}

    def _ended(self, completion: Completion, writer: OutputWriter) -> dict[str, Any]:
        reply = completion.replies[0]
        sequence = reply.sequence
        sampled = sampled_fields(sequence.seed, sequence.adapter, sequence.weight_versions)
        sampled["model"] = sequence.adapter or self.response["model"]
        if reply.node is not None:
            sampled["node"] = reply.node
        if self.body.return_token_ids:
            sampled |= {"prompt_token_ids": completion.prompt_ids, "token_ids": sequence.tokens}
        counts = len(completion.prompt_ids), len(sequence.tokens)
        return ended(self.response, sequence.stop_reason, writer.items, *counts, sampled)

    async def _logprobs(self, positions: Sequence[Position]) -> list[dict[str, Any]]:
        """Returns logprobs in OpenAI's form; none if the request asks for none."""
        if not self.body.with_logprobs or not positions:
            return []
        names = await TokenNames.of(self.turn.target.sampler, positions, False)
        return chat_logprobs(positions, names, self.body.top_logprobs)


def _sampler_of(samplers: Samplers, target: Target, previous: ResponseId) -> Sampler:
    """Returns the sampler of a previous response. Raises InvalidRequestError if it is not that of the request."""
    sampler = samplers.named(previous.sampler)
    if sampler.application != target.sampler.application:
        raise InvalidRequestError(
            f"the previous response is of the sampler {previous.sampler!r}, the request of {target.sampler.name!r}.",
            "previous_response_id",
        )
    return sampler
