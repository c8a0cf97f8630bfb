"""Text of a stream: whole characters, and nothing of what becomes a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.stops import Texts, exempt_characters, stop_cut
from twinkle_serve.engines.text import TextStream


def decode(tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
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


def test_character_that_min_tokens_split_belongs_to_the_token_that_completes_it() -> None:
    """A stop string that ends with it counts."""
    params = DecodingParams(stop_strings=("é",), min_tokens=1)
    tokens = [*"é".encode()]
    assert exempt_characters(tokens, params, decode) == 0
    assert Texts.of([tokens], [True], params, decode).decoded == [""]
    assert exempt_characters([*b"aa"], params, decode) == 1


def test_texts_end_at_the_stop_string_of_the_whole_text() -> None:
    """Special tokens, here the capitals, are left out of the text before it."""

    def plain(tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text = decode(tokens)
        return "".join(c for c in text if not c.isupper()) if skip_special_tokens else text

    for text, stop, expected in (("1E23", "12", "123"), ("1E2", "E2", "1"), ("abE", "bE", "a"), ("aEbé", "é", "ab")):
        params = DecodingParams(stop_strings=(stop,), skip_special_tokens=True)
        texts = Texts.of([[*text.encode()]], [stop in text], params, plain)
        assert texts.decoded == [expected]
        stream = TextStream(plain, params)
        data = text.encode()
        deltas = [
            stream.push([byte], last=i == len(data) - 1, by_stop_string=stop in text and i == len(data) - 1)
            for i, byte in enumerate(data)
        ]
        assert "".join(deltas) == expected, text
