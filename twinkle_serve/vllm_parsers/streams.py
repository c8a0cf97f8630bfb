"""Message streams of vLLM's parsers.

Parsers that are built on vLLM's incremental engine are fed with the text as it arrives. The others would read the
whole text again for each part, so they are called once, at the end of the sample; text before their markup is released
as it comes. At the end the parsers of complete texts are called, and what the deltas lack is added.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from twinkle_serve.data_format.call_streams import Beginnings, HeldCalls
from twinkle_serve.data_format.message_stream import (
    ContentAndCalls,
    ContentDelta,
    MessageDelta,
    ParsedCall,
    ParsedMessage,
    ReasoningDelta,
    ReasoningSplitter,
    Record,
    SampleParsing,
    ToolCallArguments,
    ToolCallBegin,
    call_id,
)
from twinkle_serve.errors import one_line
from twinkle_serve.vllm_parsers.loading import is_pair, make_parser, reads_special_tokens
from twinkle_serve.vllm_parsers.parsers import VLLMParsers

logger = logging.getLogger(__name__)

STARTS: dict[str, tuple[str, ...]] = {
    "apertus": ("<|tools_prefix|>",),
    "deepseek_v3": ("<｜tool▁calls▁begin｜>",),
    "deepseek_v31": ("<｜tool▁calls▁begin｜>",),
    "dots": ("<dots_function_call>",),
    "functiongemma": ("<start_function_call>",),
    "granite-20b-fc": ("<function_call>",),
    "granite4": ("<tool_call>",),
    "hermes": ("<tool_call>",),
    "hy_v3": ("<tool_call",),
    "hy_v4": ("<tool_call",),
    "internlm": ("<|action_start|>",),
    "jamba": ("<tool_calls>",),
    "lfm2": ("<|tool_call_start|>",),
    "llama3_json": ("<|python_tag|>", "{"),
    "llama4_json": ("<|python_tag|>", "{"),
    "llama4_pythonic": ("<|python_start|>", "["),
    "longcat": ("<longcat_tool_call>",),
    "minicpm5": ("<",),
    "phi4_mini_json": ("functools",),
    "poolside_v1": ("<tool_call>",),
    "pythonic": ("[",),
    "qwen3_json": ("<tool_call>",),
    "step3": ("<｜tool_calls_begin｜>",),
    "xlam": ("{", "[", "<", "`"),
}
"""Of tool parsers without an engine: texts before which they find no markup. Those not listed hold back everything."""
LIVE_ARGUMENTS = frozenset(
    {
        "deepseek_v32", "deepseek_v4", "deepseek_v41", "gemma4", "glm45", "glm47", "granite", "inkling", "kimi_k2",
        "ling3", "minimax_m3", "plamo3",
    }
)  # fmt: skip
"""Tool parsers with an engine whose parts of arguments add up to those of the complete text, if that is truncated too.
The arguments of others are released with the next call, or at the end."""
GROWTH = 0.1
"""Some of vLLM's engines convert all arguments of a call again for each part. So inside of a call, they get the next
part when it is this long, as a fraction of the text of the call. The time stays linear."""
SWITCHED_OFF = frozenset({"deepseek_v3", "holo2", "hy_v3", "hy_v4", "poolside_v1"})
"""Reasoning parsers that return the text unchanged if the chat template's arguments switch reasoning off."""
TAGS = ("<think>", "</think>")
"""Tags of reasoning parsers that do not tell theirs."""


class Complete(NamedTuple):
    """A complete text, as vLLM's parsers read it."""

    reasoning: str
    content: str
    calls: list[Any]
    """vLLM's FunctionCall objects."""


class Splitter(Protocol):
    """Splits a text into reasoning and content, as ReasoningSplitter."""

    def push(self, text: str, last: bool = False) -> tuple[str, str]: ...


class VLLMMessageStream:
    """The MessageStream of a sample whose tool calls, reasoning or both are parsed by vLLM."""

    def __init__(self, parsers: VLLMParsers, sample: SampleParsing) -> None:
        """
        Raises:
            TemplateError: the parsers cannot be used in this process.
        """
        self._parsers, self._tools = parsers, sample.tools
        self._parser, self._request = make_parser(parsers, sample.tools)
        self._opening = sample.opening
        kept = sample.special_tokens if not reads_special_tokens(parsers) else parsers.end_tokens
        reasoner = self._parser.reasoning_parser
        tags = _tags(reasoner) if reasoner is not None else ()
        self._filter = sample.token_filter(token for token in kept if token not in tags)
        self._own_splitter = ReasoningSplitter(sample.reasoning)
        self._own_calls = ContentAndCalls(sample.calls, sample.number)
        pair = is_pair(self._parser)
        self._splitter = self._make_splitter(parsers, pair)
        self._calls = self._make_calls(parsers, sample, pair)
        self._texts: list[str] = []
        """What vLLM's parsers read."""
        self._split: list[str] = []
        """The content that `_splitter` returned."""
        self._record = Record()

    def _make_splitter(self, parsers: VLLMParsers, pair: bool) -> Splitter:
        if parsers.reasoning_parser is None:
            return ReasoningSplitter(None)
        if not pair:
            return HeldReasoning()
        return splitter_of(parsers.reasoning_parser, self._parser.reasoning_parser, self._request)

    def _make_calls(self, parsers: VLLMParsers, sample: SampleParsing, pair: bool) -> VLLMCalls | None:
        if parsers.tool_parser is None:
            return None
        live = self._parser.tool_parser if pair and _is_live(self._parser.tool_parser) else None
        starts = STARTS.get(parsers.tool_parser) if pair else None
        whole = parsers.tool_parser not in LIVE_ARGUMENTS
        return VLLMCalls(live, starts, self._request, sample.number, whole_arguments=whole)

    def push(self, text: str, token_ids: Sequence[int] = (), last: bool = False) -> list[MessageDelta]:
        self._record.check_open(last)
        text, self._opening = self._opening + text, ""
        own, text = self._own_splitter.push(self._filter.push(text, last), last)
        self._texts.append(text)
        reasoning, content = self._splitter.push(text, last)
        complete = self._complete() if last else None
        if complete is not None and self._parser.reasoning_parser is not None:
            reasoning += _missing("reasoning", self._record.reasoning + reasoning, complete.reasoning)
        deltas: list[MessageDelta] = [ReasoningDelta(own + reasoning)] if own + reasoning else []
        deltas += self._content(content, complete)
        return self._record.add(deltas)

    def _content(self, content: str, complete: Complete | None) -> list[MessageDelta]:
        if self._calls is None:
            self._split.append(content)
            if complete is not None:
                content += _missing("content", "".join(self._split), complete.content)
            return self._own_calls.push(content, complete is not None)
        deltas = self._calls.push(content, complete is not None)
        if complete is not None:
            deltas += self._calls.finish(complete)
        return deltas

    def _complete(self) -> Complete:
        text = "".join(self._texts)
        parser, request = make_parser(self._parsers, self._tools)
        try:
            reasoning, content, calls = parser.parse(text, request, enable_auto_tools=True)
        except Exception as error:  # whatever a parser raises for malformed text
            logger.warning("vLLM's parser failed, the text is returned as content: %s", one_line(error))
            return Complete("", text, [])
        return Complete(reasoning or "", content or "", calls or [])

    def parsed(self) -> ParsedMessage:
        return self._record.parsed(self._own_calls.calls if self._calls is None else self._calls.parsed)


def _missing(what: str, known: str, complete: str) -> str:
    """Returns the text that the deltas lack."""
    if complete.startswith(known):
        return complete[len(known) :]
    if complete.strip() != known.strip():
        logger.debug("%s: vLLM's parser of complete texts returned %.200r, deltas were %.200r", what, complete, known)
    return ""


def _is_live(part: Any) -> bool:
    """Whether a parser of vLLM is fed with parts of the text, without reading earlier ones again."""
    return bool(part.engine_based_streaming) and hasattr(part, "_parser_engine")


# -- reasoning -----------------------------------------------------------------------------------


def _tags(reasoner: Any) -> tuple[str, str]:
    return reasoner.reasoning_start_str or TAGS[0], reasoner.reasoning_end_str or TAGS[1]


def splitter_of(name: str, reasoner: Any, request: object) -> Splitter:
    """Makes the splitter for a reasoning parser of vLLM, by what it returns for a few texts."""
    if _is_live(reasoner):
        return EngineReasoning(reasoner)
    start, end = _tags(reasoner)

    def split(text: str) -> tuple[str, str]:
        reasoning, content = reasoner.extract_reasoning(text, request)
        return reasoning or "", content or ""

    try:
        if name in SWITCHED_OFF and all(split(text) == ("", text) for text in ("a", f"{start}a{end}b", f"a{end}b")):
            return ReasoningSplitter(None)
        open_from_start = (
            split("\na ") == ("\na ", "")
            and split(f" a\n{end}\n b") == (" a\n", "\n b")
            and split(f"{start}\n a{end} b{end}") == ("\n a", f" b{end}")
        )
    except Exception:  # a parser that reads more than its tags
        return HeldReasoning()
    return OpenReasoning(start, end) if open_from_start else HeldReasoning()


class EngineReasoning:
    """Feeds a reasoning parser that is built on vLLM's incremental engine."""

    def __init__(self, reasoner: Any) -> None:
        self._reasoner = reasoner

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        parts = [self._reasoner.extract_reasoning_streaming("", "", text, (), (), ())] if text else []
        if last:
            parts.append(self._reasoner.finish_streaming())
        known = [part for part in parts if part is not None]
        return "".join(part.reasoning or "" for part in known), "".join(part.content or "" for part in known)


class OpenReasoning:
    """Splits a text that begins with reasoning, whether or not the opening tag is there."""

    def __init__(self, start: str, end: str) -> None:
        self._start, self._end = start, end
        self._ends = Beginnings([end])
        self._held = ""
        self._push: Callable[[str, bool], tuple[str, str]] = self._before

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        return self._push(text, last)

    def _before(self, text: str, last: bool) -> tuple[str, str]:
        text, self._held = self._held + text, ""
        if not last and len(text) < len(self._start) and self._start.startswith(text):
            self._held = text
            return "", ""
        self._push = self._inside
        return self._push(text.removeprefix(self._start), last)

    def _inside(self, text: str, last: bool) -> tuple[str, str]:
        text, self._held = self._held + text, ""
        end = text.find(self._end)
        if end >= 0:
            self._push = self._behind
            return text[:end], text[end + len(self._end) :]
        final = len(text) if last else self._ends.index(text)
        self._held = text[final:]
        return text[:final], ""

    def _behind(self, text: str, last: bool) -> tuple[str, str]:
        return "", text


class HeldReasoning:
    """Returns nothing: all of the message is added when the sample is complete."""

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        return "", ""


# -- tool calls ----------------------------------------------------------------------------------


class VLLMCalls:
    """Turns content into deltas: live by a parser with an engine, else text before the markup alone."""

    def __init__(
        self,
        live: Any | None,
        starts: tuple[str, ...] | None,
        request: object,
        number: int,
        *,
        whole_arguments: bool,
    ) -> None:
        """
        Args:
            live: tool parser of vLLM that is built on its incremental engine; None: calls come at the end.
            starts: texts before which there is no markup; None: all text is held back.
            request: request of vLLM with the tools.
            number: index of the message in its conversation.
            whole_arguments: whether the arguments of a call are released as one piece.
        """
        self._live = live
        self._whole_arguments = whole_arguments
        self._held: list[str] = []
        """Arguments of the last call that are held back."""
        self._request = request
        self._number = number
        self._before = HeldCalls(lambda text: ("", []), starts)
        self._waiting: list[str] = []
        """Text that `live` has not got."""
        self._in_call = 0
        """Length of the text that `live` has got since it last returned content."""
        self._space = ""
        """Space at the end of the content, which vLLM's parsers may leave out."""
        self._content: list[str] = []
        self._read: list[str] = []
        self._begun: list[tuple[str, str]] = []
        """Id and name of each call."""
        self._arguments: list[list[str]] = []

    def push(self, text: str, last: bool) -> list[MessageDelta]:
        """Adds content. `finish` follows the last."""
        self._read.append(text)
        if self._live is None:
            return self._text("".join(piece for piece in self._before.push(text) if isinstance(piece, str)))
        self._waiting.append(text)
        if not last and sum(map(len, self._waiting)) < self._in_call * GROWTH:
            return []
        text, self._waiting = "".join(self._waiting), []
        parts = [self._live.extract_tool_calls_streaming("", "", text, (), (), (), self._request)] if text else []
        if last:
            parts.append(self._live.finish_streaming())
        deltas: list[MessageDelta] = []
        self._in_call += len(text)
        for part in parts:
            if part is not None:
                if part.content:
                    self._in_call = 0
                deltas += self._text(part.content or "")
                for call in part.tool_calls:
                    deltas += self._part(call)
        return deltas

    def finish(self, complete: Complete) -> list[MessageDelta]:
        """Adds what the deltas lack."""
        text = _missing("content", "".join(self._content), complete.content)
        deltas: list[MessageDelta] = [ContentDelta(text)] if text else []
        self._content.append(text)
        for index, call in enumerate(complete.calls):
            if index == len(self._begun):
                deltas += self._begin(call.name, call.id)
            known = "".join(self._arguments[index])
            deltas += self._add(index, _missing("arguments", known, call.arguments or "{}"))
        if len(self._begun) > len(complete.calls):
            deltas += self._release()
        return deltas

    def _text(self, text: str) -> list[MessageDelta]:
        if self._begun and not self._content:
            text = text.lstrip()  # vLLM leaves out space behind a call if it comes as a part of its own
        text, self._space = self._space + text, ""
        content = text.rstrip()
        self._space = text[len(content) :]
        if not content:
            return []
        self._content.append(content)
        return [ContentDelta(content)]

    def _part(self, call: Any) -> list[MessageDelta]:
        """Adds a part of a call, which vLLM's engine returned."""
        deltas: list[MessageDelta] = []
        if call.function.name and call.index == len(self._begun):
            deltas = [*self._release(), *self._begin(call.function.name, call.id)]
        arguments = call.function.arguments or ""
        if self._whole_arguments:
            self._held.append(arguments)
            return deltas
        return deltas + self._add(call.index, arguments)

    def _release(self) -> list[MessageDelta]:
        """Releases the arguments of the last call, which is complete."""
        text, self._held = "".join(self._held), []
        return self._add(len(self._begun) - 1, text)

    def _begin(self, name: str, known_id: str | None) -> list[MessageDelta]:
        index = len(self._begun)
        is_written = known_id and known_id in "".join(self._read)  # the others are random
        self._begun.append((known_id if known_id and is_written else call_id(self._number, index), name))
        self._arguments.append([])
        return [ToolCallBegin(index, *self._begun[-1])]

    def _add(self, index: int, arguments: str) -> list[MessageDelta]:
        if not arguments or not 0 <= index < len(self._begun):
            return []
        self._arguments[index].append(arguments)
        return [ToolCallArguments(index, arguments)]

    @property
    def parsed(self) -> list[ParsedCall]:
        """The calls so far."""
        return [
            ParsedCall(known_id, name, _arguments("".join(parts)), "".join(parts))
            for (known_id, name), parts in zip(self._begun, self._arguments, strict=True)
        ]


def _arguments(text: str) -> dict[str, Any] | str:
    """Parses the arguments of a call; returns the text if it is not a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
