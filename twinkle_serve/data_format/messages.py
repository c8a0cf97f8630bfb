"""Messages of a conversation, and how a sample's text becomes one."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.tool_calls import ToolCall, ToolParser, Tools, tool_parser


class Encoded(TypedDict):
    """What of an InputFeature's `messages` its `input_ids` hold.

    `new_input_feature` writes it under the key `encoded`. A feature that comes back with more messages is
    continued after its own tokens.
    """

    ids: int
    """Length of `input_ids`. Where it differs, a caller has put tokens in: `input_ids` are taken as they are."""
    messages: list[int]
    """Checksum of each message that the tokens hold."""
    assistant_start: int
    """Index in `input_ids` of the first token sampled for the last message; `ids` where none was sampled."""


SAID = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
"""What chat templates read of a message."""


def checksum(message: Mapping[str, Any]) -> int:
    """Of what a message says: what a caller adds to it besides, such as a reward, does not change it."""
    said = json.dumps([message.get(key) or None for key in SAID], sort_keys=True, default=repr)
    return zlib.crc32(said.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a prompt already holds of the turn that its sample goes on with, and of those before."""

    opening: str = ""
    """Text at the prompt's end that belongs to the assistant's message: `<think>`, or what an earlier sample left
    unfinished. A character whose bytes were cut apart there stays broken in the message; its tokens are whole."""
    resumed_at: int | None = None
    """Index in the prompt where the unfinished message's sampled tokens begin; None if the message is a new one."""
    labels: NDArray[np.int64] | None = None
    """The token at each position of the prompt that a loss is taken at, shape [P], not rolled; None: there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageParser:
    """Turns a sample's text into the assistant's message. Needs no tokenizer, and travels with the samples."""

    special_tokens: tuple[str, ...] = ()
    """Texts that are left out of a message, unless they are markup of a tool call or of reasoning."""
    tool_parser: str | ToolParser | None = None
    """Name in TOOL_PARSERS, or a parser itself. None: the text is never a call."""
    reasoning: tuple[str, str] | None = None
    """Opening and closing tag of what the model thinks before it answers. None: the text is never reasoning."""

    def message(self, text: str, tools: Tools = (), number: int = 0) -> dict[str, Any]:
        """`{"role": "assistant", "content": …}`, with `reasoning_content` and `tool_calls` if the text has them.

        Args:
            text: of the whole turn, special tokens kept.
            tools: the conversation's, which tell what type an argument has where the markup does not.
            number: of the message in its conversation, for the ids of its calls.

        Raises:
            TemplateError: `tool_parser` is registered in the service, and not in this process.
        """
        parser = tool_parser(self.tool_parser) if isinstance(self.tool_parser, str) else self.tool_parser
        reasoning, content = self._split(self._stripped(text, parser))
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if parser is not None:
            rest, calls = parser.parse(content, tools)
            if calls:
                message["content"] = rest.strip()
                message["tool_calls"] = [_as_dict(call, number, i) for i, call in enumerate(calls)]
        return message

    def _stripped(self, text: str, parser: ToolParser | None) -> str:
        markup = {*(self.reasoning or ()), *(parser.markers if parser else ())}
        dropped = sorted((token for token in self.special_tokens if token not in markup), key=len, reverse=True)
        return re.sub("|".join(map(re.escape, dropped)), "", text) if dropped else text

    def _split(self, text: str) -> tuple[str, str]:
        """(reasoning, rest). Reasoning that is not closed, since the sample was cut, has no rest."""
        if self.reasoning is None:
            return "", text
        opening, closing = self.reasoning
        if not text.lstrip().startswith(opening):
            return "", text
        reasoning, _, rest = text.lstrip().removeprefix(opening).partition(closing)
        return reasoning.strip("\n"), rest.lstrip("\n")


def _as_dict(call: ToolCall, number: int, i: int) -> dict[str, Any]:
    """In OpenAI's form, arguments parsed. Mistral's chat templates take only ids of nine letters and digits."""
    made = call.id or f"call{number % 1000:03}{i % 100:02}"
    return {"id": made, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
