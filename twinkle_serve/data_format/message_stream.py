"""Turns a sample's text into the assistant's message while it arrives.

`MessageParser.stream` makes a stream for one sample. A complete text is parsed by the same code, as one part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Protocol, TypeAlias

from twinkle_serve.data_format.call_streams import Beginnings, CallStream, Piece


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More text of the message's content."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More text of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """A tool call begins. Comes before its arguments."""

    index: int
    """Number of the call in the message, from 0."""
    id: str
    name: str
    """Name of the function."""


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More text of a call's arguments, which are one JSON text."""

    index: int
    """Number of the call in the message."""
    text: str


MessageDelta: TypeAlias = ContentDelta | ReasoningDelta | ToolCallBegin | ToolCallArguments


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A tool call of a message."""

    id: str
    name: str
    """Name of the function."""
    arguments: dict[str, Any] | str
    """Arguments by name. Text if a parser of vLLM returned no JSON object."""
    text: str
    """The arguments as JSON text, as the model wrote it where its format is JSON."""


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """The assistant's message in a sample."""

    content: str
    reasoning: str
    calls: tuple[ParsedCall, ...]

    def message(self) -> dict[str, Any]:
        """Returns it as a dict: `role`, `content`, and `reasoning_content` and `tool_calls` if there are any.

        Of a message with calls, space before the content is left out here: a stream has sent it before the calls.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.content.strip() if self.calls else self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


class MessageStream(Protocol):
    """Parser of one sample's text.

    Guarantees:
        All deltas joined are what MessageParser.parse returns for the whole text, however it is cut into parts.
        Text is held back only while it may be markup, or space that the message would not contain.
        The time is linear in the length of the text.
    """

    def push(self, text: str, token_ids: Sequence[int] = (), last: bool = False) -> list[MessageDelta]:
        """Adds text and returns the deltas that became final.

        Args:
            text: the sample's new text, special tokens included. It does not end inside of a character.
            token_ids: the sample's new tokens, for parsers that read them. Those of this package and of vLLM read text.
            last: whether the sample is complete. Releases everything that was held back.

        Raises:
            ValueError: the stream has ended.
        """
        ...

    def parsed(self) -> ParsedMessage:
        """Returns the message so far."""
        ...


class SpecialTokenFilter:
    """Removes the texts of special tokens, at each position the longest."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._pattern, self._beginnings = _token_patterns(tuple(sorted({*tokens} - {""}, key=lambda t: (-len(t), t))))
        self._held = ""

    def push(self, text: str, last: bool = False) -> str:
        if self._pattern is None:
            return text
        text, at = self._held + text, 0
        kept: list[str] = []
        while True:
            match = self._pattern.search(text, at)
            end = len(text) if last else self._beginnings.index(text, at)
            if match is None or match.start() >= end:
                break
            kept.append(text[at : match.start()])
            at = match.end()
        kept.append(text[at:end])
        self._held = text[end:]
        return "".join(kept)


@lru_cache(maxsize=64)
def _token_patterns(tokens: tuple[str, ...]) -> tuple[re.Pattern[str] | None, Beginnings]:
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None, Beginnings(tokens)


class ReasoningSplitter:
    """Splits a text into the reasoning in tags at its start, and the rest.

    Line breaks at the ends of the reasoning and before the rest belong to neither. Reasoning without closing tag, of a
    truncated sample, has no rest.
    """

    def __init__(self, tags: tuple[str, str] | None) -> None:
        self._opening, self._closing = tags or ("", "")
        self._ends = Beginnings([self._closing])
        self._held = ""
        self._begun = False
        """Whether there was reasoning besides line breaks."""
        self._push: Callable[[str, bool], tuple[str, str]] = self._before if tags else self._unsplit

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """Adds text. Returns the reasoning and the rest that became final."""
        return self._push(text, last)

    def _unsplit(self, text: str, last: bool) -> tuple[str, str]:
        return "", text

    def _before(self, text: str, last: bool) -> tuple[str, str]:
        text, self._held = self._held + text, ""
        begun = text.lstrip()
        if begun.startswith(self._opening):
            self._push = self._inside
            return self._push(begun[len(self._opening) :], last)
        if not last and self._opening.startswith(begun):
            self._held = text
            return "", ""
        self._push = self._unsplit
        return "", text

    def _inside(self, text: str, last: bool) -> tuple[str, str]:
        text, self._held = self._held + text, ""
        end = text.find(self._closing)
        if end >= 0:
            self._push = self._behind
            return self._reasoning(text[:end]), self._push(text[end + len(self._closing) :], last)[1]
        final = text[: len(text) if last else self._ends.index(text)].rstrip("\n")
        self._held = text[len(final) :]
        return self._reasoning(final), ""

    def _reasoning(self, text: str) -> str:
        text = (text if self._begun else text.lstrip("\n")).rstrip("\n")
        self._begun = self._begun or bool(text)
        return text

    def _behind(self, text: str, last: bool) -> tuple[str, str]:
        """Leaves out line breaks before the rest."""
        text = text.lstrip("\n")
        if text:
            self._push = self._unsplit
        return "", text


class ContentAndCalls:
    """Turns pieces of text and calls into deltas.

    Of a message with calls, space at the end of the content is left out, and space before it that stands after a call.
    """

    def __init__(self, calls: CallStream | None, number: int) -> None:
        """
        Args:
            calls: parser of the calls; None: there are none.
            number: index of the message in its conversation, used in the ids of its calls.
        """
        self._stream = calls
        self._number = number
        self._space = ""
        """Space at the end of the text so far."""
        self._has_text = False
        self.calls: list[ParsedCall] = []

    def push(self, text: str, last: bool = False) -> list[MessageDelta]:
        if self._stream is None:
            return [ContentDelta(text)] if text else []
        deltas: list[MessageDelta] = []
        for piece in self._stream.push(text, last):
            deltas += self._deltas_of(piece)
        if last and self._space and not self.calls:
            deltas.append(ContentDelta(self._space))
        return merged(deltas)

    def _deltas_of(self, piece: Piece) -> list[MessageDelta]:
        if isinstance(piece, str):
            return self._text(piece)
        index = len(self.calls)
        call = ParsedCall(piece.id or call_id(self._number, index), piece.name, piece.arguments, piece.text)
        self.calls.append(call)
        if not self._has_text:
            self._space = ""
        return [ToolCallBegin(index, call.id, call.name), ToolCallArguments(index, call.text)]

    def _text(self, text: str) -> list[MessageDelta]:
        if not self._has_text and self.calls:
            text = text.lstrip()
        text, self._space = self._space + text, ""
        content = text.rstrip()
        if not content:
            self._space = text
            return []
        self._space = text[len(content) :]
        self._has_text = True
        return [ContentDelta(content)]


def merged(deltas: list[MessageDelta]) -> list[MessageDelta]:
    """Joins neighbouring deltas of the content."""
    joined: list[MessageDelta] = []
    for is_text, group in groupby(deltas, key=lambda delta: isinstance(delta, ContentDelta)):
        some = list(group)
        joined += [ContentDelta("".join(getattr(delta, "text", "") for delta in some))] if is_text else some
    return joined


def call_id(number: int, index: int) -> str:
    """Mistral's chat templates accept only ids of nine alphanumerics."""
    return f"call{number % 1000:03}{index % 100:02}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleParsing:
    """How one sample is parsed, apart from what other packages' parsers do."""

    special_tokens: Sequence[str]
    """Texts of the model's special tokens."""
    reasoning: tuple[str, str] | None
    """Opening and closing tag; None: reasoning is not parsed."""
    calls: CallStream | None
    """Parser of the tool calls; None: they are not parsed."""
    markers: Sequence[str]
    """Markup that `calls` reads."""
    tools: Sequence[object]
    """Tools of the conversation."""
    number: int
    """Index of the message in its conversation."""
    opening: str
    """Text of the turn before the sample."""

    def token_filter(self, tokens: Iterable[str]) -> SpecialTokenFilter:
        """Removes the texts of `tokens`, unless they are markup."""
        markup = {*(self.reasoning or ()), *self.markers}
        return SpecialTokenFilter(token for token in tokens if token not in markup)


class OtherParsers(Protocol):
    """Parsers of another package. Pickled with a response, and loaded where a message is read."""

    def load(self) -> None:
        """Loads them in this process."""
        ...

    def without_tools(self) -> OtherParsers | None:
        """Returns them without that of tool calls; None if no other is left."""
        ...

    def stream(self, sample: SampleParsing) -> MessageStream:
        """Makes a parser of one sample."""
        ...


class TextMessageStream:
    """The MessageStream of this package's own parsers, which read text alone."""

    def __init__(self, sample: SampleParsing) -> None:
        self._opening = sample.opening
        self._filter = sample.token_filter(sample.special_tokens)
        self._splitter = ReasoningSplitter(sample.reasoning)
        self._calls = ContentAndCalls(sample.calls, sample.number)
        self._record = Record()

    def push(self, text: str, token_ids: Sequence[int] = (), last: bool = False) -> list[MessageDelta]:
        self._record.check_open(last)
        text, self._opening = self._opening + text, ""
        reasoning, content = self._splitter.push(self._filter.push(text, last), last)
        deltas: list[MessageDelta] = [ReasoningDelta(reasoning)] if reasoning else []
        deltas += self._calls.push(content, last)
        return self._record.add(deltas)

    def parsed(self) -> ParsedMessage:
        return self._record.parsed(self._calls.calls)


class Record:
    """The text that a stream has returned."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._ended = False

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def check_open(self, last: bool) -> None:
        """
        Raises:
            ValueError: the stream has ended.
        """
        if self._ended:
            raise ValueError("push was called after the part with last=True, which ends a message stream.")
        self._ended = last

    def add(self, deltas: list[MessageDelta]) -> list[MessageDelta]:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self._content.append(delta.text)
            elif isinstance(delta, ReasoningDelta):
                self._reasoning.append(delta.text)
        return deltas

    def parsed(self, calls: Iterable[ParsedCall]) -> ParsedMessage:
        return ParsedMessage(self.content, self.reasoning, tuple(calls))
