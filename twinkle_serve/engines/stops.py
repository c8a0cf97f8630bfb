"""Texts of samples, and where stop strings end them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from twinkle_serve.data_format.sampling_params import DecodingParams

REPLACEMENT_CHARACTER = "\ufffd"
"""Written by tokenizers for bytes that are not a character, or not yet a complete one."""


def stop_cut(text: str, params: DecodingParams, exempt: int = 0) -> int | None:
    """Returns where a sample's text ends: before the stop string that completes first, as in vLLM, or after it with
    include_stop_str_in_output; None without one.

    Of two that complete at the same character, the first one named counts.

    Args:
        exempt: number of characters of the first min_tokens tokens, in which none counts.
    """
    found = []
    for i, stop in enumerate(params.stop_strings):
        if (at := text.find(stop, max(0, exempt + 1 - len(stop)))) >= 0:
            found.append((at + len(stop), i, at))
    if not found:
        return None
    end, _, start = min(found)
    return end if params.include_stop_str_in_output else start


def exempt_characters(tokens: Sequence[int], params: DecodingParams, decode: Callable[[Sequence[int]], str]) -> int:
    """Returns the length of the text of the first min_tokens tokens, in which no stop string counts."""
    if not params.min_tokens or not params.stop_strings:
        return 0
    # Without what may become a character: it is of a later token then.
    return len(decode(tokens[: params.min_tokens]).rstrip(REPLACEMENT_CHARACTER))


class Decode(Protocol):
    """Decodes tokens to text."""

    def __call__(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of the samples of a group."""

    decoded: list[str]
    """As the parameters ask for them."""
    whole: list[str] | None
    """With special tokens, where `decoded` lacks them."""

    @classmethod
    def of(
        cls, tokens: Sequence[Sequence[int]], by_stop_string: Sequence[bool], params: DecodingParams, decode: Decode
    ) -> Texts:
        """Decodes samples.

        Args:
            tokens: of each sample.
            by_stop_string: whether a stop string ended it, and so its text.
        """
        whole = [decode(ids) for ids in tokens]
        ends = [
            stop_cut(text, params, exempt_characters(ids, params, decode)) if cut else None
            for text, ids, cut in zip(whole, tokens, by_stop_string, strict=True)
        ]
        texts = [text[:end] for text, end in zip(whole, ends, strict=True)]
        if not params.skip_special_tokens:
            return cls(texts, None)
        return cls([without_special_tokens(ids, end, decode) for ids, end in zip(tokens, ends, strict=True)], texts)


def without_special_tokens(tokens: Sequence[int], end: int | None, decode: Decode) -> str:
    """Returns a text without special tokens.

    Args:
        end: number of characters with them at which the text ends; None: all.
    """
    if end is None:
        return decode(tokens, skip_special_tokens=True)
    whole = bisect_right(range(len(tokens) + 1), end, key=lambda count: len(decode(tokens[:count]))) - 1
    text = decode(tokens[:whole], skip_special_tokens=True)
    within = end - len(decode(tokens[:whole]))  # of the next token
    following = decode(tokens[: whole + 1], skip_special_tokens=True)[len(text) :]
    return text + following[:within]
