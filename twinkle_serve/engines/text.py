"""Incremental text of a streamed sample."""

from __future__ import annotations

from collections.abc import Sequence

from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.stops import (
    REPLACEMENT_CHARACTER,
    Decode,
    exempt_characters,
    stop_cut,
    without_special_tokens,
)


class TextStream:
    """Turns tokens into text as they arrive.

    Guarantees:
        No delta splits a character or contains part of a stop string, unless that is kept.
        All deltas joined are the sample's `decoded`.
    """

    def __init__(self, decode: Decode, params: DecodingParams) -> None:
        self._decode = decode
        self._params = params
        self._tokens: list[int] = []
        self._decode_from = self._settled = 0
        """Decoding starts at `_decode_from`, as text may depend on the previous token; up to `_settled` it is final."""
        self._text = ""
        """Text of the tokens, special ones included, without an incomplete character."""
        self._sent = ""

    def push(self, tokens: Sequence[int], *, last: bool = False, by_stop_string: bool = False) -> str:
        """Adds tokens and returns the text that became final with them.

        Args:
            last: releases the text that was held back.
            by_stop_string: the sample ended at a stop string, and so does the text.
        """
        self._tokens.extend(tokens)
        known = self._decode(self._tokens[self._decode_from : self._settled])
        new = self._decode(self._tokens[self._decode_from :])[len(known) :]
        if last or not new.endswith(REPLACEMENT_CHARACTER):
            self._text += new
            self._decode_from, self._settled = self._settled, len(self._tokens)
        end = len(self._text)
        if by_stop_string and (cut := self._cut()) is not None:
            end = cut
        elif not last and not self._params.include_stop_str_in_output:
            end -= self._length_of_possible_stop()
        text = self._text[:end]
        if self._params.skip_special_tokens:
            text = without_special_tokens(self._tokens, end, self._decode)
        delta, self._sent = text[len(self._sent) :], max(self._sent, text, key=len)
        return delta

    def _cut(self) -> int | None:
        return stop_cut(self._text, self._params, exempt_characters(self._tokens, self._params, self._decode))

    def _length_of_possible_stop(self) -> int:
        """Returns the length of the longest end of the text that is the start of a stop string."""
        longest = 0
        for stop in self._params.stop_strings:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
