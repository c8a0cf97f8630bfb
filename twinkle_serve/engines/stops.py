"""Texts of samples, and where stop strings end them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from twinkle_serve.data_format.sampling_params import DecodingParams


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
    return len(decode(tokens[: params.min_tokens]))


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
        samples = list(zip(tokens, by_stop_string, strict=True))
        whole = [_text(ids, cut, params, decode) for ids, cut in samples]
        if not params.skip_special_tokens:
            return cls(whole, None)
        plain = partial(decode, skip_special_tokens=True)
        return cls([_text(ids, cut, params, plain) for ids, cut in samples], whole)


def _text(
    tokens: Sequence[int], by_stop_string: bool, params: DecodingParams, decode: Callable[[Sequence[int]], str]
) -> str:
    text = decode(tokens)
    return text[: stop_cut(text, params, exempt_characters(tokens, params, decode))] if by_stop_string else text
