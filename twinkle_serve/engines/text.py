"""Text of a sample while it is being sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twinkle_serve.engines.base import stop_cut

UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not yet one."""


class TextStream:
    """Turns tokens into text as they come.

    Guarantees: no delta splits a character, or holds a part of what becomes a stop string.
    Guarantees: all deltas together are the sample's `decoded`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str]) -> None:
        self._decode = decode
        self._stops = stop_strings
        self._tokens: list[int] = []
        self._before = self._settled = 0
        """Tokens are decoded from `_before`, as some depend on the one in front; text up to `_settled` is known."""
        self._text = ""
        self._sent = 0

    def push(self, tokens: Sequence[int], *, last: bool = False, by_stop_string: bool = False) -> str:
        """The text that is certain now and was not before.

        Args:
            last: releases what was held back.
            by_stop_string: the sample ended at a stop string, which is cut off with what follows it.
        """
        self._tokens.extend(tokens)
        known = self._decode(self._tokens[self._before : self._settled])
        new = self._decode(self._tokens[self._before :])[len(known) :]
        if last or not new.endswith(UNFINISHED):
            self._text += new
            self._before, self._settled = self._settled, len(self._tokens)
        end = len(self._text)
        if by_stop_string and (cut := stop_cut(self._text, self._stops)) is not None:
            end = cut
        elif not last:
            end -= self._may_become_a_stop()
        delta, self._sent = self._text[self._sent : end], max(self._sent, end)
        return delta

    def _may_become_a_stop(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
