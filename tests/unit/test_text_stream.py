"""Text of a stream: whole characters, and nothing of what becomes a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.stops import stop_cut
from twinkle_serve.engines.text import TextStream


def decode(tokens: Sequence[int]) -> str:
    """A token a byte."""
    return bytes(tokens).decode(errors="replace")


def stopping(*stops: str) -> DecodingParams:
    return DecodingParams(stop_strings=stops)


def streamed(text: str, stops: Sequence[str] = (), *, by_stop_string: bool = False) -> list[str]:
    """Deltas of a text whose bytes come one at a time."""
    stream = TextStream(decode, stopping(*stops))
    data = text.encode()
    return [
        stream.push([byte], last=i == len(data) - 1, by_stop_string=by_stop_string and i == len(data) - 1)
        for i, byte in enumerate(data)
    ]


def test_stream_never_splits_a_character() -> None:
    """Two, three and four bytes: each comes whole, with its last byte."""
    assert streamed("aé€😀b") == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_stream_holds_back_what_may_become_a_stop_string() -> None:
    """Until it is one, which is cut off, or cannot be one any more."""
    assert streamed("1 en two end", ["end", "never"], by_stop_string=True) == [
        *("1", " ", "", "", "en ", "t", "w", "o", " ", "", "", ""),
    ]
    assert "".join(streamed("the e", ["end"])) == "the e"


def test_stream_keeps_the_text_of_an_end_of_sequence_that_is_a_stop_string_too() -> None:
    """The token ended the sample, not the string: `decoded` has it, and so has the stream."""
    assert "".join(streamed("2<end>", ["<end>"])) == "2<end>"
    assert "".join(streamed("2<end>", ["<end>"], by_stop_string=True)) == "2"


@pytest.mark.parametrize("stopped", [True, False])
@given(text=st.text(alphabet="abé€😀", min_size=1), stop=st.text(alphabet="abé€😀", min_size=1, max_size=3))
def test_deltas_together_are_the_text(stopped: bool, text: str, stop: str) -> None:
    """Whatever is held back in between; up to the stop string where that ended it."""
    if stopped:
        text = text.replace(stop, "") + stop
        cut = stop_cut(text, stopping(stop))
        text = text[: (cut or 0) + len(stop)]  # a sample ends where it is complete for the first time
    assert "".join(streamed(text, [stop], by_stop_string=stopped)) == (
        text[: stop_cut(text, stopping(stop))] if stopped else text
    )
