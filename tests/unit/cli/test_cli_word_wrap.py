"""Replies of `chat` on a terminal: lines break between words, whatever the parts in which they arrive."""

from __future__ import annotations

import pytest

from twinkle_serve.cli.word_wrap import WordWrap

TEXT = "In many cultures a number is two.\nNew line"


def wrapped(text: str, width: int, size: int) -> str:
    wrap = WordWrap(width)
    return "".join(wrap.feed(text[i : i + size]) for i in range(0, len(text), size)) + wrap.end()


@pytest.mark.parametrize("size", [1, 3, 100])
def test_lines_break_between_words(size: int) -> None:
    """No line is longer than the terminal, and no word is lost or cut."""
    shown = wrapped(TEXT, 16, size)
    assert all(len(line) <= 16 for line in shown.splitlines())
    assert shown.split() == TEXT.split()
    assert shown.splitlines()[-1] == "New line"


def test_text_that_fits_is_unchanged() -> None:
    """Indentation and spaces stay."""
    text = "def f():\n    return  1\n"
    assert wrapped(text, 80, 2) == text


def test_scripts_without_spaces_are_shown_at_once() -> None:
    """Each wide letter is a word."""
    wrap = WordWrap(5)
    assert wrap.feed("東京都") == "東京\n都"


def test_a_word_longer_than_a_line_is_whole() -> None:
    """The terminal breaks it; the next word follows."""
    assert wrapped("a" * 25 + " b", 10, 4) == "a" * 25 + " b"
