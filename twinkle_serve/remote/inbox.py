"""One-way messages to an object in the process of an actor.

A call through a Serve handle costs caller and replica 3.7 to 6.1 ms of CPU in all, a task of the bare actor without a
result 1.4 ms: see docs/decisions/016. Ray keeps their order. A message may be lost with the actor; whoever posts it
must notice.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_inboxes: dict[str, Inbox[Any]] = {}
"""Open inboxes of this process, by name."""


class Inbox(Generic[T]):
    """Takes messages on the event loop that it was made on, until it is closed."""

    def __init__(self, take: Callable[[T], None]) -> None:
        """
        Args:
            take: called with each message, in their order.
        """
        self.name = uuid.uuid4().hex
        self._take = take
        self._loop = asyncio.get_running_loop()
        with _lock:
            _inboxes[self.name] = self

    def close(self) -> None:
        """Drops later messages. Those that came before are taken within this turn of the event loop."""
        with _lock:
            _inboxes.pop(self.name, None)

    def put(self, message: T) -> None:
        """Hands a message over, from any thread."""
        self._loop.call_soon_threadsafe(self._take, message)


def deliver(actor: object, name: str, message: object) -> None:
    """Puts a message into an inbox of this process; dropped if it is closed. Called by Ray, with the actor."""
    with _lock:
        if (inbox := _inboxes.get(name)) is not None:
            inbox.put(message)


@dataclass(slots=True)
class Address(Generic[T]):
    """An inbox, for other processes."""

    actor: Any
    """Handle of the actor in whose process it is."""
    name: str
    _method: Any = field(default=None, compare=False, repr=False)

    def post(self, message: T) -> None:
        """Sends a message. Returns at once.

        Raises:
            RayError: the actor is known to be gone. Exceptions of pickling.
        """
        if self._method is None:
            self._method = self.actor.__ray_call__.options(num_returns=0)
        self._method.remote(deliver, self.name, message)

    def __getstate__(self) -> tuple[Any, str]:
        return self.actor, self.name

    def __setstate__(self, state: tuple[Any, str]) -> None:
        self.actor, self.name = state
        self._method = None
