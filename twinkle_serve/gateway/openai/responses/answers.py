"""The object `response`: as it begins, as it ends, and as a session keeps it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.errors import SessionNotFoundError
from twinkle_serve.gateway.conversations import deltas_of
from twinkle_serve.gateway.errors import Failure, NotFoundError
from twinkle_serve.gateway.openai.responses.fields import ResponsesRequest
from twinkle_serve.gateway.openai.responses.ids import ResponseId
from twinkle_serve.gateway.openai.responses.output import OutputWriter, Status, parsed
from twinkle_serve.gateway.samplers import Sampler
from twinkle_serve.sessions.codec import unpack_turn
from twinkle_serve.sessions.records import SessionRecord, loads
from twinkle_serve.sessions.tree import Node, SessionTree

ECHOED = (
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "safety_identifier",
    "store",
    "temperature",
    "top_logprobs",
    "top_p",
    "user",
)
"""Fields of the request that are part of the response."""

ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""Codes of errors by status; others are server_error."""


def begun(body: ResponsesRequest, response_id: ResponseId, model: str) -> dict[str, Any]:
    """Returns a response of which nothing is sampled yet."""
    return {
        "id": str(response_id),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "model": model,
        "output": [],
        **{name: getattr(body, name) for name in ECHOED},
        "metadata": body.metadata or {},
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "session_id": response_id.session,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": _tool_choice(body),
        "tools": list(body.tools or ()),
        "truncation": "disabled",
        "usage": None,
    }


def _tool_choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def status_of(reason: StopReason) -> Status:
    """Returns the status of a reply that has ended."""
    return "completed" if reason == "stop" else "incomplete"


def ended(
    response: Mapping[str, Any],
    reason: StopReason,
    output: Sequence[Mapping[str, Any]],
    prompt_tokens: int,
    tokens: int,
    sampled: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns a complete response.

    Args:
        response: as `begun`.
        sampled: fields of its own about the sample, such as its seed.
    """
    details = {"length": {"reason": "max_output_tokens"}}.get(reason)
    completed = {"completed_at": int(time.time())} if reason == "stop" else {}
    return {
        **response,
        **completed,
        "status": status_of(reason),
        "incomplete_details": details,
        "output": list(output),
        "usage": usage(prompt_tokens, tokens),
        **sampled,
    }


def failed(response: Mapping[str, Any], failure: Failure) -> dict[str, Any]:
    """Returns a response that ended with an error."""
    code = ERROR_CODES.get(failure.status, "server_error")
    return {**response, "status": "failed", "error": {"code": code, "message": failure.message}}


def usage(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Returns `usage`. Neither cached tokens nor those of reasoning are counted by themselves."""
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input_tokens + output_tokens,
    }


def sampled_fields(seed: int | None, adapter: str, weight_versions: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """Returns the fields about a sample: its seed and weights."""
    return {
        "seed": seed,
        "adapter": adapter or None,
        "weight_versions": [
            {"version": version, "start": start, "end": end} for version, start, end in weight_versions
        ],
    }


def note_of(response: Mapping[str, Any]) -> str:
    """Returns a response for its session, without the parts that the session has anyway."""
    left_out = {"id", "output", "usage", "tools", "instructions", "session_id"}
    kept = {key: value for key, value in response.items() if key not in left_out and value is not None}
    return json.dumps(kept | {"has_instructions": response["instructions"] is not None})


class StoredResponse:
    """A response in its session."""

    def __init__(self, response_id: ResponseId, node: Node) -> None:
        self.id, self.node = response_id, node
        self._note: dict[str, Any] = json.loads(node.turn.note)

    @classmethod
    async def find(cls, sampler: Sampler, response_id: ResponseId) -> StoredResponse:
        """Reads it.

        Raises:
            NotFoundError: the session does not have it.
            SessionGoneError: its session has ended.
        """
        assert response_id.session is not None
        try:
            record = await sampler.sessions.read_session(response_id.session)
        except SessionNotFoundError:
            record = None
        node = None if record is None else await run_in_threadpool(_node, record, response_id.turn)
        if node is None or not node.turn.note:
            raise NotFoundError(f"no response {str(response_id)!r:.100} is stored.")
        return cls(response_id, node)

    @property
    def has_instructions(self) -> bool:
        """Whether the first message is its request's `instructions`."""
        return bool(self._note["has_instructions"])

    def messages(self) -> list[dict[str, Any]]:
        """Returns the conversation with the reply, without `instructions`, which apply to one response only."""
        return self._messages()[self.has_instructions :]

    def _messages(self) -> list[dict[str, Any]]:
        """Returns the whole conversation, replies as clients were given them."""
        messages: list[dict[str, Any]] = []
        for node in self.node.path:
            messages += loads(node.turn.messages)
            reply = loads(node.sample.shown or node.sample.reply)
            if node.turn.replaces and node.sample.reply:
                del messages[-1:]
            messages += [] if reply is None else [reply]
        return messages

    def answer(self) -> dict[str, Any]:
        """Returns the object `response`."""
        turn, sample = self.node.turn, self.node.sample
        messages = self._messages()
        reply = loads(sample.shown or sample.reply) or {}
        writer = OutputWriter(self.id)
        writer.push(deltas_of(parsed(reply)))
        writer.end(status_of(sample.stop_reason))
        note = {key: value for key, value in self._note.items() if key != "has_instructions"}
        empty = dict.fromkeys(ECHOED) | {"error": None, "incomplete_details": None}
        response = (
            empty
            | note
            | {
                "id": str(self.id),
                "session_id": self.id.session,
                "instructions": messages[0]["content"] if self.has_instructions else None,
                "tools": [_tool(tool) for tool in loads(self.node.path[0].turn.tools) or ()],
            }
        )
        starts = [start for _, start in sample.weight_versions[1:]] + [len(sample.tokens)]
        spans = [(label, start, end) for (label, start), end in zip(sample.weight_versions, starts, strict=True)]
        fields = sampled_fields(sample.seed, sample.adapter, spans) | {"node": self.node.id}
        answer = ended(response, sample.stop_reason, writer.items, turn.prompt_length, len(sample.tokens), fields)
        return answer | ({"completed_at": int(turn.created)} if "completed_at" in answer else {})


def _node(record: SessionRecord, turn: str) -> Node | None:
    """Returns the sample of a turn; None if the session does not have it."""
    tree = SessionTree(map(unpack_turn, record.turns))
    numbers = tree.nodes_of(turn)
    return tree.nodes[numbers[0]] if numbers else None


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "description": None, "parameters": None, "strict": None, **tool["function"]}
