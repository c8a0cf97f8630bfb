"""Finds tool calls in a sample's text while it arrives.

A format of calls is a reader: a generator that begins at its markup, yields while the result depends on text that has
not arrived, and returns the calls. Each character is looked at a fixed number of times, however the text is cut.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from twinkle_serve.data_format.tool_calls import ToolCall

T = TypeVar("T")
Piece: TypeAlias = "str | ToolCall"
"""A part of the text around the calls, or a call."""
Waiting: TypeAlias = Generator[None, None, T]
"""Yields until more text has arrived; returns T."""
CallsAndEnd: TypeAlias = "tuple[list[ToolCall], int]"
"""Calls, and the index in the text where they end. No calls: malformed, the markup up to there is text."""


class CallStream(Protocol):
    """Splits a text into the text around the calls, and calls."""

    def push(self, text: str, last: bool = False) -> list[Piece]:
        """Adds text and returns the pieces that became final, in order.

        Args:
            text: text that follows the text so far.
            last: whether the text ends with it.
        """
        ...


class Source:
    """Text that arrives in parts."""

    def __init__(self) -> None:
        self.text = ""
        self.last = False
        """Whether the text is complete."""

    def add(self, text: str, last: bool) -> None:
        known, self.text = self.text, ""  # the only reference: CPython then appends without copying
        known += text
        self.text = known
        self.last = last


class Beginnings:
    """Recognises texts whose end may be the beginning of a marker."""

    def __init__(self, markers: Iterable[str]) -> None:
        marked = tuple(markers)
        self._heads = frozenset(marker[:length] for marker in marked for length in range(1, len(marker)))
        self._longest = max((len(marker) - 1 for marker in marked), default=0)

    def index(self, text: str, at: int = 0) -> int:
        """Index, not before `at`, from which the text may be the beginning of a marker; its length if there is none."""
        for start in range(max(at, len(text) - self._longest), len(text)):
            if text[start:] in self._heads:
                return start
        return len(text)


class CallScanner:
    """Reads calls wherever one of their openings is found."""

    def __init__(self, openings: tuple[str, ...], read: Callable[[Source, int], Waiting[CallsAndEnd]]) -> None:
        """
        Args:
            openings: texts with which calls begin. None is a part of another.
            read: reads the calls at an index of the text, where an opening is. Ends behind the opening.
        """
        self._opening, self._beginnings = _patterns(openings)
        self._read = read
        self._source = Source()
        self._at = 0
        """The pieces before this index are final."""
        self._reading: Waiting[CallsAndEnd] | None = None

    def push(self, text: str, last: bool = False) -> list[Piece]:
        self._source.add(text, last)
        pieces: list[Piece] = []
        while self._reading is not None or self._find(pieces):
            if not self._read_on(pieces):
                return pieces
        self._source.text = self._source.text[self._at :]
        self._at = 0
        return pieces

    def _find(self, pieces: list[Piece]) -> bool:
        """Releases the text before the next opening. Returns whether there is one."""
        source = self._source
        match = self._opening.search(source.text, self._at)
        if match is not None:
            self._reading, end = self._read(source, match.start()), match.start()
        elif source.last:
            end = len(source.text)
        else:
            end = self._beginnings.index(source.text, self._at)
        self._release(pieces, end)
        return match is not None

    def _read_on(self, pieces: list[Piece]) -> bool:
        """Continues to read calls. Returns whether they are complete."""
        assert self._reading is not None
        try:
            next(self._reading)
        except StopIteration as stop:
            calls, end = stop.value
            if calls:
                pieces += calls
                self._at = end
            self._release(pieces, end)
            self._reading = None
            return True
        return False

    def _release(self, pieces: list[Piece], end: int) -> None:
        if end > self._at:
            pieces.append(self._source.text[self._at : end])
        self._at = end


class HeldCalls:
    """Parses the calls at the end of the text, of a format that is known as a function alone.

    Text before the first of `starts` is released as it comes.
    """

    def __init__(
        self, parse: Callable[[str], tuple[str, list[ToolCall]]], starts: tuple[str, ...] | None = None
    ) -> None:
        """
        Args:
            parse: maps the text from the first of `starts` on to (text without the calls, calls).
            starts: texts before which there is no call. None: a call may begin anywhere.
        """
        self._parse = parse
        self._start, self._beginnings = _patterns(starts or ())
        self._source = Source()
        self._holds = starts is None

    def push(self, text: str, last: bool = False) -> list[Piece]:
        source = self._source
        source.add(text, last)
        before = "" if self._holds else self._released()
        pieces: list[Piece] = [before] if before else []
        if not last:
            return pieces
        rest, calls = self._parse(source.text) if source.text else ("", [])
        rest = rest if calls else source.text
        return [*pieces, *calls, *([rest] if rest else [])]

    def hold(self) -> None:
        """Holds back all text from now on."""
        self._holds = True

    def _released(self) -> str:
        source = self._source
        match = self._start.search(source.text)
        self._holds = match is not None
        end = match.start() if match else len(source.text) if source.last else self._beginnings.index(source.text)
        before, source.text = source.text[:end], source.text[end:]
        return before


@lru_cache(maxsize=64)
def _patterns(markers: tuple[str, ...]) -> tuple[re.Pattern[str], Beginnings]:
    return re.compile("|".join(map(re.escape, markers))), Beginnings(markers)


# -- what readers wait for -----------------------------------------------------------------------


def await_space(source: Source, at: int) -> Waiting[int]:
    """Returns the index of the next character that is not space; the length of the text if there is none."""
    while (at := skip_space(source.text, at)) == len(source.text) and not source.last:
        yield
    return at


def await_literal(source: Source, at: int, literal: str) -> Waiting[bool]:
    """Returns whether the text continues with `literal`."""
    while not source.last and len(source.text) - at < len(literal) and literal.startswith(source.text[at:]):
        yield
    return source.text.startswith(literal, at)


def await_match(source: Source, at: int, pattern: re.Pattern[str]) -> Waiting[re.Match[str] | None]:
    """Returns the next match of a pattern of one character; None if there is none."""
    while (match := pattern.search(source.text, at)) is None and not source.last:
        at = len(source.text)
        yield
    return match


def await_found(source: Source, at: int, literal: str) -> Waiting[int | None]:
    """Returns the index of the next `literal`; None if there is none."""
    start = at
    while (found := source.text.find(literal, start)) < 0:
        if source.last:
            return None
        start = max(at, len(source.text) - len(literal) + 1)
        yield
    return found


_STRUCTURE = re.compile(r'["{}\[\]]|[^\s\w.+\-:,"{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_DELIMITER = re.compile(r"[^\w.+\-]")
_SCALARS = frozenset("-0123456789tfn")
"""Characters with which numbers, true, false and null begin."""


def await_json(source: Source, at: int) -> Waiting[tuple[object, int] | None]:
    """Parses the JSON value that begins at `at`, whatever follows it. Returns it and its end; None if it is invalid."""
    at = yield from await_space(source, at)
    if source.text[at : at + 1] in ("{", "[", '"'):
        if not (yield from _await_json_end(source, at)):
            return None
    elif source.text[at : at + 1] in _SCALARS:
        yield from await_match(source, at, _DELIMITER)
    else:
        return None
    return json_at(source.text, at)


def _await_json_end(source: Source, at: int) -> Waiting[bool]:
    """Waits for the end of an object, array or string. Returns whether it may be valid."""
    depth, in_string = 0, False
    while True:
        match = yield from await_match(source, at, _IN_STRING if in_string else _STRUCTURE)
        if match is None:
            return False
        character, at = match.group(), match.end()
        del match  # refers to the text, which is appended to without a copy while nothing else does
        if character == "\\":
            at += 1  # where there is no such character yet, the search waits for it
            while at > len(source.text) and not source.last:
                yield
        elif character == '"':
            in_string = not in_string
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        else:
            return False
        if depth <= 0 and not in_string:
            return True


# -- JSON ----------------------------------------------------------------------------------------


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)  # 1e999


# Not strict: models write raw line breaks into strings.
_JSON = json.JSONDecoder(strict=False, parse_constant=_no_number, parse_float=_finite)
_SPACE = re.compile(r"\s*")


def skip_space(text: str, at: int) -> int:
    """Index of the next character from `at` on that is not space."""
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def json_at(text: str, at: int) -> tuple[object, int] | None:
    """Parses the JSON value that begins at `at`, whatever follows it. Returns it and its end; None if it is invalid."""
    try:
        return _JSON.raw_decode(text, skip_space(text, at))
    except (ValueError, RecursionError):  # samples can nest deeper than Python
        return None


def json_parts(text: str, at: int) -> list[tuple[object, str]]:
    """Splits the valid JSON object or array at `at` into (key, text of the value); keys of an array are indices."""
    at = skip_space(text, at)
    is_object = text[at] == "{"
    parts: list[tuple[object, str]] = []
    at = skip_space(text, at + 1)
    while text[at] not in "}]":
        key: object = len(parts)
        if is_object:
            key, at = _JSON.raw_decode(text, at)
            at = skip_space(text, skip_space(text, at) + 1)  # behind the colon
        _, end = _JSON.raw_decode(text, at)
        parts.append((key, text[at:end]))
        at = skip_space(text, end)
        if text[at] == ",":
            at = skip_space(text, at + 1)
    return parts
