"""The output of a response: its items, and the events of a stream that make them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from twinkle_serve.data_format.message_stream import (
    ContentDelta,
    MessageDelta,
    ParsedCall,
    ParsedMessage,
    ReasoningDelta,
    ToolCallBegin,
)
from twinkle_serve.data_format.messages import ChatMessage, reasoning_of
from twinkle_serve.gateway.openai.responses.ids import ResponseId

Event: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["completed", "incomplete"]
Kind: TypeAlias = Literal["reasoning", "message", "function_call"]

PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class OutputWriter:
    """Makes the items of a response from the parts of a message, and the events that tell of them.

    Reasoning and text are items that end where something else begins.
    """

    def __init__(self, response: ResponseId) -> None:
        self._id = response
        self.items: list[dict[str, Any]] = []
        """The items so far; complete after `end`."""
        self._open: int | None = None
        """Index of the item that has not ended."""
        self._of_call: dict[int, int] = {}
        """Index of the item of each call."""
        self._logprobs: list[dict[str, Any]] = []
        self._sent_logprobs = 0

    def push(self, deltas: Sequence[MessageDelta], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Adds parts of the message. Returns their events.

        Args:
            logprobs: of the new tokens. They are part of the item with text, those of other tokens, too.
        """
        self._logprobs += logprobs
        return [event for delta in deltas for event in self._add(delta)]

    def end(self, status: Status) -> list[Event]:
        """Completes the last item. A response without any gets one of empty text. Returns the events."""
        events = [] if self.items else self._begin("message")
        return events + self._close(status)

    def _add(self, delta: MessageDelta) -> list[Event]:
        if isinstance(delta, ToolCallBegin):
            events = self._close()
            self._of_call[delta.index] = len(self.items)
            return [*events, *self._begin("function_call", call_id=delta.id, name=delta.name, arguments="")]
        if isinstance(delta, ContentDelta):
            events = self._begin("message")
            self._part()["text"] += delta.text
            return [*events, self._event("output_text.delta", delta=delta.text, logprobs=self._new_logprobs())]
        if isinstance(delta, ReasoningDelta):
            events = self._begin("reasoning")
            self._part()["text"] += delta.text
            return [*events, self._event("reasoning_text.delta", delta=delta.text)]
        index = self._of_call[delta.index]
        self.items[index]["arguments"] += delta.text
        return [self._event("function_call_arguments.delta", index, delta=delta.text)]

    def _begin(self, kind: Kind, **fields: Any) -> list[Event]:
        """Returns the events that begin an item, unless one of its kind with text is open."""
        if self._open is not None and self.items[self._open]["type"] == kind != "function_call":
            return []
        events = self._close()
        index = self._open = len(self.items)
        item = {"type": kind, "id": self._id.item(PREFIXES[kind], index), "status": "in_progress", **fields}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        if kind == "reasoning":
            item |= {"summary": [], "content": []}
        self.items.append(item)
        events.append(_item_event("added", item, index))
        if kind != "function_call":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events.append(self._event("content_part.added", part=dict(part)))
            item["content"] = [part]
        return events

    def _close(self, status: Status = "completed") -> list[Event]:
        """Ends the open item. Returns the events."""
        if self._open is None:
            return []
        item, index = self.items[self._open], self._open
        item["status"] = status
        events: list[Event] = []
        if item["type"] == "function_call":
            events.append(self._event("function_call_arguments.done", arguments=item["arguments"]))
        elif item["type"] == "reasoning":
            events.append(self._event("reasoning_text.done", text=self._part()["text"]))
        else:
            self._part()["logprobs"] = self._logprobs
            events.append(self._event("output_text.done", text=self._part()["text"], logprobs=self._logprobs))
        if item["type"] != "function_call":
            events.append(self._event("content_part.done", part=dict(self._part())))
        events.append(_item_event("done", item, index))
        self._open = None
        return events

    def _part(self) -> dict[str, Any]:
        """Returns the text of the open item."""
        assert self._open is not None
        part: dict[str, Any] = self.items[self._open]["content"][0]
        return part

    def _event(self, name: str, index: int | None = None, **fields: Any) -> Event:
        """Returns an event of an item.

        Args:
            index: of the item; None: the open one.
        """
        at = self._open if index is None else index
        assert at is not None
        item = self.items[at]
        place = {"item_id": item["id"], "output_index": at}
        if item["type"] != "function_call":
            place["content_index"] = 0
        return {"type": f"response.{name}", **place, **fields}

    def _new_logprobs(self) -> list[dict[str, Any]]:
        new, self._sent_logprobs = self._logprobs[self._sent_logprobs :], len(self._logprobs)
        return new


def _item_event(name: str, item: Mapping[str, Any], index: int) -> Event:
    return {"type": f"response.output_item.{name}", "output_index": index, "item": dict(item)}


def parsed(message: ChatMessage) -> ParsedMessage:
    """Returns a reply in the form of chat completions as its parts."""
    calls = [(call["id"], call["function"]) for call in message.get("tool_calls") or ()]
    return ParsedMessage(
        content=message.get("content") or "",
        reasoning=str(reasoning_of(message) or ""),
        calls=tuple(
            ParsedCall(call_id, function["name"], function["arguments"], _text(function["arguments"]))
            for call_id, function in calls
        ),
    )


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
