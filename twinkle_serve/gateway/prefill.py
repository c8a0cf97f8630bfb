"""Replies that continue a message of the client's, without that message."""

from __future__ import annotations


class PrefillRemover:
    """Removes the beginning of a text that arrives in parts, if it is the expected one.

    Space at the beginning of either is not compared: templates and parsers remove it.
    """

    def __init__(self, prefill: str) -> None:
        self._left = prefill.lstrip()
        self._held: str | None = "" if self._left else None
        """Text that may be part of the beginning; None once that is decided."""

    def push(self, text: str, last: bool = False) -> str:
        """Returns the text that is not part of the beginning.

        Args:
            last: whether the text is complete. Releases everything that was held back.
        """
        if self._held is None:
            return text
        self._held += text
        held = self._held.lstrip()
        if held.startswith(self._left):
            self._held = None
            return held.removeprefix(self._left)
        if self._left.startswith(held) and not last:
            return ""
        held, self._held = self._held, None
        return "" if self._left.startswith(held.lstrip()) else held
