"""Actors of this process, for addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Actor:
    """Stands for the handle of an actor: runs a function here, at once."""

    def __init__(self) -> None:
        self.loses = 0
        """How many of the next messages are lost."""

    def options(self, **options: Any) -> Actor:
        return self

    def remote(self, function: Callable[..., None], *args: Any) -> None:
        if self.loses:
            self.loses -= 1
        else:
            function(self, *args)


Actor.__ray_call__ = property(lambda actor: actor)  # type: ignore[attr-defined]
