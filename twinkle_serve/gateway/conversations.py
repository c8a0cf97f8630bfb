"""One turn of a conversation, whichever protocol it comes by: messages in, messages out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from twinkle_serve.data_format import SampledSequence, SampleResponse
from twinkle_serve.data_format.message_stream import (
    ContentDelta,
    MessageDelta,
    MessageStream,
    ParsedCall,
    ParsedMessage,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallBegin,
)
from twinkle_serve.data_format.messages import ChatMessage, MessageParser, Turn
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.sample_updates import CallBegun, SampleUpdate
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.errors import ServiceError
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.samplers import Target
from twinkle_serve.sessions import Conversation, SessionTurn

Finish: TypeAlias = Literal["stop", "length", "tool_calls", "abort"]

HOLD_S = 3600.0
"""A session does not expire while a turn without a deadline runs, for so long."""

MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")
"""Keys of a message that reach the template."""
SILENT_KEYS: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "id": (),
    "status": ("completed",),
    "type": ("message",),
}
"""Keys that clients send back with an answer, and the values that say nothing besides null."""


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """`tool_choice` that leaves the model no choice: the sample is the JSON of one call, or of a list of calls."""

    tools: Sequence[Mapping[str, Any]]
    """The functions that it may call."""
    name: str | None = None
    """The one that it has to call; None: at least one of them."""
    once: bool = False
    """Whether it makes no more than one call."""

    def structured_outputs(self) -> dict[str, Any]:
        """Returns the structured output that forces it."""
        if self.name is not None:
            return {"json": self._parameters(self.name)}
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "parameters": self._parameters(tool["name"])},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for tool in self.tools
        ]
        most = {"maxItems": 1} if self.once else {}
        return {"json": {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}}}

    def _parameters(self, name: str) -> Any:
        tool = next(tool for tool in self.tools if tool["name"] == name)
        return tool.get("parameters") or {"type": "object", "properties": {}}

    def parse(self, text: str, number: int) -> ParsedMessage:
        """Returns the calls of a sample. One that was cut short has its text as content, or as arguments."""
        if self.name is not None:
            return ParsedMessage(content="", reasoning="", calls=(_call(self.name, text, number, 0),))
        try:
            calls = json.loads(text)
            parsed = tuple(
                _call(call["name"], json.dumps(call["parameters"], ensure_ascii=False), number, i)
                for i, call in enumerate(calls)
            )
        except (ValueError, TypeError, KeyError):
            return ParsedMessage(content=text, reasoning="", calls=())
        return ParsedMessage(content="", reasoning="", calls=parsed)


def _call(name: str, text: str, number: int, i: int) -> ParsedCall:
    try:
        arguments = json.loads(text)
    except ValueError:  # cut short
        arguments = text
    return ParsedCall(id=f"call{number % 1000:03}{i % 100:02}", name=name, arguments=arguments, text=text)


class _ForcedStream:
    """A `MessageStream` of a forced call: the arguments of a named one as they come, a list when it is complete."""

    def __init__(self, forced: ForcedCall, number: int) -> None:
        self._forced, self._number = forced, number
        self._text = ""
        self._begun = False

    def push(self, text: str, token_ids: Sequence[int] = (), last: bool = False) -> list[MessageDelta]:
        self._text += text
        if self._forced.name is not None:
            deltas: list[MessageDelta] = []
            if not self._begun:
                self._begun = True
                call = _call(self._forced.name, "{}", self._number, 0)
                deltas.append(ToolCallBegin(0, call.id, call.name))
            return [*deltas, ToolCallArguments(0, text)] if text else deltas
        return deltas_of(self.parsed()) if last else []

    def parsed(self) -> ParsedMessage:
        return self._forced.parse(self._text, self._number)


def deltas_of(message: ParsedMessage) -> list[MessageDelta]:
    """Returns a whole message as deltas."""
    deltas: list[MessageDelta] = []
    if message.reasoning:
        deltas.append(ReasoningDelta(message.reasoning))
    if message.content:
        deltas.append(ContentDelta(message.content))
    for i, call in enumerate(message.calls):
        deltas += [ToolCallBegin(i, call.id, call.name), ToolCallArguments(i, call.text)]
    return deltas


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """A turn to sample."""

    target: Target
    messages: Sequence[ChatMessage]
    tools: Sequence[Mapping[str, Any]] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters; `num_samples` is the number of replies."""
    forced: ForcedCall | None = None
    parse_tools: bool = True
    """Whether calls are read out of the text; False for `tool_choice: none`."""
    one_call: bool = False
    """Whether a reply has at most one call; further ones are left out of it, and stay in its tokens."""
    continue_final_message: bool = False
    session: str | None = None
    """Id of the session that the turn is part of."""
    turn_id: str | None = None
    """Id of the turn in its session; None: a new one."""
    note: str = ""
    """Text that the session keeps with the turn."""
    caller: str = ""
    timeout_s: float | None = None

    @property
    def number(self) -> int:
        """Index of the reply in the conversation."""
        return len(self.messages) - self.continue_final_message

    async def find(self) -> SessionTurn | None:
        """Returns the place of the turn in its session; None without a session.

        Raises:
            InvalidRequestError: the conversation ends with a sampled message, which it does not ask to continue.
        """
        if self.session is None:
            return None
        conversation = Conversation.of_messages(list(self.messages), list(self.tools) or None)
        hold_s = self.timeout_s or HOLD_S
        found = await self.target.sampler.sessions.find_turn(self.session, conversation.query, hold_s=hold_s)
        turn = SessionTurn(conversation, found)
        if turn.continues_message and not self.continue_final_message:
            raise InvalidRequestError(
                "the conversation ends with the assistant's message. Append one, or set continue_final_message.",
                "messages",
            )
        return turn

    def call(self, place: SessionTurn | None, *, update_text: Literal["decoded", "whole"] = "whole") -> SampleRequest:
        """Returns the call of the router.

        Args:
            place: of the turn in its session.
        """
        params = dict(self.params)
        if self.forced is not None:
            if "structured_outputs" in params:
                raise InvalidRequestError("tool_choice forces a call, and response_format a text. Drop one.")
            # Its text is JSON: streams of it have no parser that removes special tokens.
            params |= {"structured_outputs": self.forced.structured_outputs(), "skip_special_tokens": True}
        options: dict[str, Any] = {"update_text": update_text}
        if self.continue_final_message:
            options["continue_final_message"] = True
        if place is not None and params.get("logprobs") is None:
            params["logprobs"] = 0  # trajectories have them
        return self.target.request([self._input(place)], params, self.caller, timeout_s=self.timeout_s, **options)

    def _input(self, place: SessionTurn | None) -> dict[str, Any]:
        if place is not None:
            return dict(place.input)
        return {"messages": list(self.messages), **({"tools": list(self.tools)} if self.tools else {})}

    async def count_tokens(self) -> int:
        """Returns the length of the prompt. Nothing is sampled, and the session stays as it is."""
        feature = self._input(await self.find())
        return await self.target.sampler.count_tokens(feature, self.continue_final_message or None)

    def parse(self, sequence: SampledSequence, parser: MessageParser, opening: str) -> ParsedMessage:
        """Parses a sample into a message."""
        if self.forced is not None:
            message = self.forced.parse(parser.without_special(sequence.whole_text), self.number)
        else:
            message = self._parser(parser).parse(opening + sequence.whole_text, self.tools, self.number)
        return replace(message, calls=message.calls[:1]) if self.one_call else message

    def message_stream(self, parser: MessageParser, opening: str) -> MessageStream:
        """Returns the incremental form of `parse`."""
        if self.forced is not None:
            return _ForcedStream(self.forced, self.number)
        return self._parser(parser).stream(self.tools, self.number, opening)

    def _parser(self, parser: MessageParser) -> MessageParser:
        return parser if self.parse_tools and self.tools else parser.without_tools()


@dataclass(frozen=True, slots=True)
class Reply:
    """One sample of a turn."""

    message: ParsedMessage
    sequence: SampledSequence
    node: int | None = None
    """Its node in the session's tree."""

    @property
    def finish(self) -> Finish:
        return finish_of(self.sequence.stop_reason, bool(self.message.calls))


def finish_of(reason: StopReason, has_calls: bool) -> Finish:
    """Returns why a reply ended."""
    if reason == "error":
        raise ServiceError("a sample ended with an error that the router did not report.")
    return "tool_calls" if reason == "stop" and has_calls else reason


@dataclass(frozen=True, slots=True)
class Completion:
    """All replies of a turn."""

    response: SampleResponse
    replies: Sequence[Reply]

    @property
    def prompt_ids(self) -> list[int]:
        ids: list[int] = self.response.prompts[0].tolist()
        return ids


@dataclass(frozen=True, slots=True)
class ReplyDelta:
    """New parts of one reply."""

    sample: int
    deltas: Sequence[MessageDelta]
    update: SampleUpdate
    finish: Finish | None
    """Set in the last one."""


Event: TypeAlias = CallBegun | ReplyDelta | Completion
"""A stream begins with a CallBegun and ends with the Completion."""


async def complete(turn: TurnRequest) -> Completion:
    """Samples the replies of a turn, and adds them to its session."""
    place = await turn.find()
    response = await turn.target.run(turn.call(place))
    return await _completion(turn, response, place)


async def _completion(turn: TurnRequest, response: SampleResponse, place: SessionTurn | None) -> Completion:
    opening = (response.turns[0] if response.turns else Turn()).opening
    await load_parser(response.parser)
    messages = [turn.parse(each, response.parser, opening) for each in response.sequences]
    nodes: Sequence[int | None] = [None] * len(messages)
    if place is not None:
        assert turn.session is not None
        shown = [message_dict(message) for message in messages]
        record = place.record(response, shown=shown, turn_id=turn.turn_id, note=turn.note)
        nodes = await turn.target.sampler.sessions.append_turn(turn.session, record)
    return Completion(response, [Reply(*each) for each in zip(messages, response.sequences, nodes, strict=True)])


async def load_parser(parser: MessageParser) -> None:
    """Loads the parser of another package, which may take 10 s in a process that has none of it yet."""
    if parser.other is not None:
        await asyncio.to_thread(parser.load)


def message_dict(message: ParsedMessage) -> ChatMessage:
    """Returns a reply in OpenAI's form, as clients send it back."""
    answer: ChatMessage = {"role": "assistant", "content": message.content}
    if message.reasoning:
        answer["reasoning_content"] = message.reasoning
    if message.calls:
        answer["content"] = message.content or None
        answer["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
            for call in message.calls
        ]
    return answer


async def stream(turn: TurnRequest) -> AsyncGenerator[Event, None]:
    """Samples the replies of a turn, and yields them as they grow.

    In a session, the ends of replies come after they were added to it: a client that has seen an end can rely on it.
    """
    place = await turn.find()
    call = turn.call(place, update_text="decoded" if turn.forced is not None else "whole")
    replies = _GrowingReplies(turn)
    ends: list[ReplyDelta] = []
    async with aclosing(turn.target.run_updates(call)) as items:
        async for item in items:
            if isinstance(item, CallBegun):
                await load_parser(item.parser)
                replies.begin(item)
                yield item
            elif isinstance(item, SampleResponse):
                completion = await _completion(turn, item, place)
                for end in ends:
                    yield end
                yield completion
            else:
                for update in item:
                    delta = replies.push(update)
                    if delta.finish is not None and place is not None:
                        ends.append(delta)
                    else:
                        yield delta


class _GrowingReplies:
    """Parses the replies of a streamed turn."""

    def __init__(self, turn: TurnRequest) -> None:
        self._turn = turn
        self._streams: list[MessageStream] = []
        self._with_calls: set[int] = set()

    def begin(self, begun: CallBegun) -> None:
        opening = (begun.turns[0] if begun.turns else Turn()).opening
        self._streams = [self._turn.message_stream(begun.parser, opening) for _ in range(begun.num_samples[0])]

    def push(self, update: SampleUpdate) -> ReplyDelta:
        reason = update.stop_reason
        deltas = self._streams[update.sample].push(update.text, update.tokens.tolist(), reason is not None)
        if self._turn.one_call:
            deltas = [each for each in deltas if getattr(each, "index", 0) == 0]
        if any(isinstance(each, ToolCallBegin) for each in deltas):
            self._with_calls.add(update.sample)
        finish = None if reason is None else finish_of(reason, update.sample in self._with_calls)
        return ReplyDelta(update.sample, deltas, update, finish)


def messages_of(messages: Sequence[Any]) -> list[ChatMessage]:
    """Returns a conversation as the template reads it.

    Raises:
        InvalidRequestError: a message has a key that would be left out of the prompt.
    """
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> ChatMessage:
    if not isinstance(message, dict):
        raise InvalidRequestError(f"{where} must be an object, got {type(message).__name__}.", where)
    kept: ChatMessage = {}
    for key, value in message.items():
        if value is None and key != "content":
            continue
        if key in MESSAGE_KEYS:
            kept[key] = value
        elif value is not None and value not in SILENT_KEYS.get(key, ()) and not _is_ours(key):
            raise InvalidRequestError(f"{where}.{key} is not supported. Leave it out.", f"{where}.{key}")
    if kept.get("role") == "developer":
        kept["role"] = "system"
    return kept


def _is_ours(key: str) -> bool:
    return key in ("token_ids",)
