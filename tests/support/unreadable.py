"""An object that can be pickled, and not unpickled."""

from __future__ import annotations

from typing import Any


class Unreadable:
    """Cannot be read on the other side."""

    def __reduce__(self) -> Any:
        return Unreadable._raise, ()

    @staticmethod
    def _raise() -> None:
        raise ImportError("no module named trainer")
