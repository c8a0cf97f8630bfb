"""Text that arrives in parts, broken between words."""

from __future__ import annotations


class WordWrap:
    """Breaks lines between words, where a terminal would break within them. The last word waits for its end."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._word = ""

    def feed(self, text: str) -> str:
        """Takes the next part. Returns what can be printed now."""
        from rich.cells import cell_len

        shown = ""
        for letter in text:
            if letter == "\n":
                shown += self.end() + letter
                self._column = 0
            elif letter.isspace():
                shown += self.end()
                if self._column < self._width:  # a space at the edge is the line break
                    shown += letter
                    self._column += 1
            elif cell_len(letter) == 2:  # scripts that are written without spaces
                shown += self.end()
                self._word = letter
                shown += self.end()
            else:
                self._word += letter
        return shown

    def end(self) -> str:
        """Returns the word that has waited."""
        from rich.cells import cell_len

        word, self._word = self._word, ""
        length = cell_len(word)
        breaks = self._column > 0 and self._column + length > self._width
        self._column = length if breaks else self._column + length
        if self._column > self._width:  # the terminal breaks a word that is longer than a line
            self._column %= self._width
        return f"\n{word}" if breaks else word
