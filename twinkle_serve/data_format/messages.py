"""Messages of a conversation, and the parser that makes one from a sample's text."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.message_stream import (
    MessageStream,
    OtherParsers,
    ParsedMessage,
    SampleParsing,
    SpecialTokenFilter,
    TextMessageStream,
)
from twinkle_serve.data_format.plain import is_absent, normalised, plain
from twinkle_serve.data_format.tool_calls import ToolParser, Tools, tool_parser
from twinkle_serve.data_format.weights import SampledSpan

ChatMessage: TypeAlias = dict[str, Any]
"""A message as a plain dict: the keys of `Message`, and others of the caller's."""


class Encoded(TypedDict):
    """The messages of an InputFeature that its `input_ids` cover.

    `new_input_feature` writes it under the key `encoded`. A feature that comes back with more messages is continued
    after its own tokens.
    """

    ids: int
    """Length of `input_ids`. Tokens that the caller appended come after them."""
    checksum: int
    """Checksum of `input_ids`."""
    messages: list[int]
    """Checksum of each message covered."""
    tools: int
    """Checksum of the tools; 0 for none."""
    assistant_start: int
    """Index in `input_ids` of the first token sampled for the last message; `ids` if none was sampled."""
    written: NotRequired[str]
    """Text of the last message before its sampled tokens, if the caller wrote it."""


TEMPLATE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
"""Keys of a message that chat templates read."""


def checksum(message: Mapping[str, object]) -> int:
    """Checksum of the keys in TEMPLATE_KEYS; other keys that a caller adds, such as a reward, do not change it.

    Nor do the types of lists, nulls that a columnar format adds, and whole numbers that it writes as floats.
    """
    values = {key: message.get(key) for key in TEMPLATE_KEYS} | {"reasoning_content": reasoning_of(message)}
    return _checksum(list(values.values()))


def reasoning_of(message: Mapping[str, object]) -> object:
    """The reasoning of a message under either of its names: vLLM's servers return it as `reasoning`."""
    known = message.get("reasoning_content")
    return message.get("reasoning") if is_absent(known) else known


def tools_checksum(tools: object) -> int:
    """Checksum of the tools of a conversation; 0 for none."""
    return 0 if is_absent(tools) else _checksum([tools])


def ids_checksum(*parts: NDArray[np.int32], before: int = 0) -> int:
    """Checksum of token ids in one or more arrays, or of those that continue ids with the checksum `before`."""
    number = before
    for part in parts:
        number = zlib.crc32(np.ascontiguousarray(part, np.int32).data, number)
    return number


def _checksum(values: list[object]) -> int:
    clean = [
        (value or None) if type(value) is str else None if is_absent(value) else normalised(plain(value))
        for value in values
    ]
    return zlib.crc32(json.dumps(clean, sort_keys=True, default=_name).encode())


def _name(value: object) -> str:
    """The same text for a value in every process, unlike the repr of a function."""
    return str(getattr(value, "__qualname__", None) or repr(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The beginning of the sampled turn that a prompt already contains, and the training columns of earlier turns."""

    opening: str = ""
    """Text at the end of the prompt that belongs to the assistant's message: `<think>`, or the unfinished text of an
    earlier sample. A character whose bytes were split there stays broken in the message; its tokens are complete."""
    resumed_at: int | None = None
    """Index in the prompt of the first sampled token of the unfinished message; None if the message is new."""
    written: str | None = None
    """Text with which `opening` begins, if the caller wrote the beginning of the unfinished message."""
    labels: NDArray[np.int64] | None = None
    """The token at each position of the prompt where a loss is taken, else IGNORED_LABEL. Shape [P], not rolled; None
    if there is no such position."""
    logprobs: NDArray[np.float64] | None = None
    """Log p of each label, nats; 0.0 for positions without a label and labels whose logprob is unknown. Shape [P], not
    rolled; None if the input has no logprobs."""
    weight_versions: tuple[SampledSpan, ...] = ()
    """The tokens of the prompt that were sampled, by the weights that sampled them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageParser:
    """Parses a sample's text into the assistant's message. It is sent along with the samples.

    Needs neither a tokenizer nor vLLM, unless `other` is set.
    """

    special_tokens: tuple[str, ...] = ()
    """Texts that are removed from messages, unless they are markup of a tool call or of reasoning."""
    tool_parser: str | ToolParser | None = None
    """Name in TOOL_PARSERS, or a parser. None: tool calls are not parsed, except by `other`."""
    reasoning: tuple[str, str] | None = None
    """Opening and closing tag of the reasoning before an answer. None: reasoning is not parsed, except by `other`."""
    other: OtherParsers | None = None
    """Parsers of another package for tool calls, reasoning or both: VLLMParsers. None: none."""

    def message(self, text: str, tools: Tools = (), number: int = 0) -> ChatMessage:
        """Parses the text of a turn.

        Args:
            text: text of the whole turn, special tokens kept.
            tools: tools of the conversation; they give the types of arguments if the markup does not.
            number: index of the message in its conversation, used in the ids of its tool calls.

        Returns:
            `{"role": "assistant", "content": …}`, with `reasoning_content` and `tool_calls` if the text has them.

        Raises:
            TemplateError: `tool_parser` is not registered in this process, or `other` cannot be used in it.
        """
        return self.parse(text, tools, number).message()

    def parse(self, text: str, tools: Tools = (), number: int = 0) -> ParsedMessage:
        """As `message`, with the JSON text of each call's arguments."""
        stream = self.stream(tools, number)
        stream.push(text, last=True)
        return stream.parsed()

    def stream(self, tools: Tools = (), number: int = 0, opening: str = "") -> MessageStream:
        """Makes a parser of one sample's text that arrives in parts.

        Args:
            tools: tools of the conversation.
            number: index of the message in its conversation.
            opening: text of the turn before the sample, `Turn.opening`. Its deltas come with the first of the sample.

        Raises:
            TemplateError: as `message`.
        """
        parser = tool_parser(self.tool_parser) if isinstance(self.tool_parser, str) else self.tool_parser
        sample = SampleParsing(
            special_tokens=self.special_tokens,
            reasoning=self.reasoning,
            calls=parser.calls(tools) if parser else None,
            markers=parser.markers if parser else (),
            tools=tools,
            number=number,
            opening=opening,
        )
        return TextMessageStream(sample) if self.other is None else self.other.stream(sample)

    def load(self) -> None:
        """Loads the parsers of other packages in this process, which may take 10 s; returns at once if there are none.

        `message`, `parse` and `stream` do it on first use.

        Raises:
            TemplateError: they cannot be used in this process.
        """
        if self.other is not None:
            self.other.load()

    def without_tools(self) -> MessageParser:
        """Returns a parser that leaves the markup of tool calls in the content."""
        other = None if self.other is None else self.other.without_tools()
        return replace(self, tool_parser=None, other=other)

    def without_special(self, text: str) -> str:
        """Removes the texts of special tokens, unless they are tags of reasoning."""
        kept = self.reasoning or ()
        return SpecialTokenFilter(token for token in self.special_tokens if token not in kept).push(text, last=True)
