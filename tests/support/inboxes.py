"""Actors of this process, for addresses."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any


class Actor:
    """Stands for the handle of an actor: runs a function here, at once."""

    def __init__(self) -> None:
        self.messages = 0
        """How many messages were sent to it."""
        self.loses = 0
        """How many of the next messages are lost."""
        self.lost = threading.Event()
        """Set when one was."""
        self.overtaken = 0
        """How many of the next messages arrive after the one that is sent after them."""
        self._waiting: list[Callable[[], None]] = []

    def options(self, **options: Any) -> Actor:
        return self

    def remote(self, function: Callable[..., None], *args: Any) -> None:
        pickle.dumps(args)  # as Ray does
        self.messages += 1
        if self.loses:
            self.loses -= 1
            self.lost.set()
        elif self.overtaken:
            self.overtaken -= 1
            self._waiting.append(lambda: function(self, *args))
        else:
            function(self, *args)
            while self._waiting:
                self._waiting.pop()()


Actor.__ray_call__ = property(lambda actor: actor)  # type: ignore[attr-defined]
