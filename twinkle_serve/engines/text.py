"""Incremental text of a running sample."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from functools import partial

from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.stops import REPLACEMENT_CHARACTER, Decode, exempt_characters, stop_cut

CHARACTER_TOKENS = 4
"""Most tokens of one character, of a byte each."""

MAX_OPEN_TOKENS = 12
"""Tokens at the end of a text that are looked at for a complete character."""


class TextStream:
    """Turns tokens into text as they arrive, in time linear in their number.

    Guarantees:
        No delta splits a character or contains part of a stop string, unless that is kept.
        All deltas joined are the sample's `decoded`.
    """

    def __init__(self, decode: Decode, params: DecodingParams, before: Sequence[int] = ()) -> None:
        """
        Args:
            before: the first tokens of the sample; their text comes with that of the first ones that are pushed.
        """
        self._decode = decode
        self._before = before
        self._params = params
        self._whole = _IncrementalText(decode, skip_special_tokens=False)
        self._plain = _PlainText(self._whole, decode) if params.skip_special_tokens else None
        """The text without special tokens, where that is asked for."""
        self._released = 0
        """Number of characters that were released, special tokens included."""
        self._held = ""
        """The text that follows them."""
        self._recent = ""
        """The text before that, as far as a stop string may begin in it."""
        self._longest_stop = max(map(len, params.stop_strings), default=0)

    def push(self, tokens: Sequence[int], *, last: bool = False, by_stop_string: bool = False) -> str:
        """Adds tokens and returns the text that became final with them.

        Args:
            last: releases the text that was held back.
            by_stop_string: the sample ended at a stop string, and so does the text.
        """
        self._held += self._whole.push([*self._before, *tokens], last=last)
        self._before = ()
        cut = self._cut() if by_stop_string else None
        if cut is not None:
            delta = self._held[:cut]
        elif last or self._params.include_stop_str_in_output:
            delta = self._held
        else:
            delta = self._held[: len(self._held) - self._length_of_possible_stop()]
        self._held = self._held[len(delta) :]
        self._released += len(delta)
        if self._longest_stop > 1:
            self._recent = (self._recent + delta)[1 - self._longest_stop :]
        if self._plain is None:
            return delta
        if cut is not None:
            return self._plain.end(self._released)
        return self._plain.flush() if last else self._plain.until(self._released)

    def _cut(self) -> int | None:
        """Returns the number of held characters before the end of the text; None without a stop string."""
        exempt = exempt_characters(self._whole.tokens, self._params, self._decode)
        before = self._released - len(self._recent)
        cut = stop_cut(self._recent + self._held, self._params, max(0, exempt - before))
        return None if cut is None else max(0, cut - len(self._recent))

    def _length_of_possible_stop(self) -> int:
        """Returns the length of the longest end of the held text that is the start of a stop string."""
        longest = 0
        for stop in self._params.stop_strings:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class _IncrementalText:
    """Text of tokens as they arrive, without incomplete characters."""

    def __init__(self, decode: Decode, *, skip_special_tokens: bool) -> None:
        self._decode = partial(decode, skip_special_tokens=skip_special_tokens)
        self.tokens: list[int] = []
        self.settled = 0
        """Number of tokens whose text is final."""
        self.length = 0
        """Number of its characters."""
        self.decode_from = 0
        """Decoding starts at this token: text may depend on the previous one."""

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Adds tokens and returns the text that became final with them, all that is left with the last ones."""
        self.tokens.extend(tokens)
        if self.settled == len(self.tokens):
            return ""
        known = self._decode(self.tokens[self.decode_from : self.settled])
        until, text = len(self.tokens), self._decode(self.tokens[self.decode_from :])
        if text.endswith(REPLACEMENT_CHARACTER) and not last:
            until, text = self._complete(text, known)
        if until > self.settled:
            self.decode_from, self.settled = self.settled, until
        new = text[len(known) :]
        self.length += len(new)
        return new

    def _complete(self, text: str, known: str) -> tuple[int, str]:
        """Returns the tokens whose text can no longer change, by their end, and the text with them.

        Args:
            text: ends with what may be an incomplete character.
            known: the final text, as far as it is decoded.
        """
        count = len(self.tokens)
        for end in range(count - 1, max(self.settled, count - MAX_OPEN_TOKENS), -1):
            head = self._decode(self.tokens[self.decode_from : end])
            if not head.endswith(REPLACEMENT_CHARACTER):
                final = text.startswith(head)
            else:  # of bytes that are no character, if others that follow do not belong to it
                final = count - end >= CHARACTER_TOKENS and text == head + self._decode(self.tokens[end:])
            if final:
                return end, head
        return self.settled, known


class _PlainText:
    """Text without special tokens, of the tokens whose text with them is released."""

    def __init__(self, whole: _IncrementalText, decode: Decode) -> None:
        """
        Args:
            whole: the same text with special tokens.
        """
        self._whole, self._decode = whole, decode
        self._text = _IncrementalText(decode, skip_special_tokens=True)
        self._ends: deque[tuple[int, int]] = deque()
        """Where characters end behind the tokens that were taken: numbers of tokens and of characters."""
        self._taken = (0, 0)
        """The last of those taken."""

    def until(self, released: int) -> str:
        """Returns the new text of the tokens within the released characters."""
        known = self._ends[-1] if self._ends else self._taken
        if self._whole.settled > known[0]:
            self._ends.append((self._whole.settled, self._whole.length))
        before = self._taken[0]
        while self._ends and self._ends[0][1] <= released:
            self._taken = self._ends.popleft()
        return self._text.push(self._whole.tokens[before : self._taken[0]])

    def flush(self) -> str:
        """Returns the rest of the text."""
        return self._text.push(self._whole.tokens[self._taken[0] :], last=True)

    def end(self, released: int) -> str:
        """Returns the rest of a text that ends with the released characters."""
        tokens, (taken, length) = self._whole.tokens, self._taken
        start = max(0, taken - MAX_OPEN_TOKENS)
        before = len(self._decode(tokens[start:taken]))

        def characters(count: int) -> int:
            return length - before + len(self._decode(tokens[start:count]))

        complete = taken + bisect_right(range(taken, len(tokens) + 1), released, key=characters) - 1
        text = self._text.push(tokens[taken:complete], last=True)
        within = released - characters(complete)  # of the next token
        inside = self._decode(tokens[start:complete], skip_special_tokens=True)
        following = self._decode(tokens[start : complete + 1], skip_special_tokens=True)[len(inside) :]
        return text + following[:within]
