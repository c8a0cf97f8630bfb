"""One-way messages to an object in the process of an actor.

A call through a Serve handle takes 3.7 to 6.1 ms of CPU in caller and replica together; a task of the actor without a
result takes 1.4 ms (docs/decisions/016). Ray runs such tasks in any order, for example a large one after smaller ones
that were sent later, and one may be lost with the actor. So they are numbered, and taken in order.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

LOST_S = 15.0
"""How long a message may be on its way after later ones have arrived."""

_lock = threading.Lock()
_inboxes: dict[str, Inbox[Any]] = {}
"""Open inboxes of this process, by name."""


class Inbox(Generic[T]):
    """Takes the messages of one sender in order, on the event loop that it was made on, until it is closed."""

    def __init__(self, take: Callable[[T], None], on_lost: Callable[[], None]) -> None:
        """
        Args:
            take: called with each message.
            on_lost: called when a message has not arrived LOST_S after a later one; nothing is taken any more.
        """
        self.name = uuid.uuid4().hex
        self._take, self._on_lost = take, on_lost
        self._loop = asyncio.get_running_loop()
        self._early: dict[int, T] = {}
        """Messages that have overtaken others, by number."""
        self._taken = 0
        with _lock:
            _inboxes[self.name] = self

    def close(self) -> None:
        """Drops later messages. Those that came before are taken within this turn of the event loop."""
        with _lock:
            _inboxes.pop(self.name, None)

    def put(self, number: int, message: T) -> None:
        """Hands a message over, from any thread."""
        self._loop.call_soon_threadsafe(self._arrive, number, message)

    def _arrive(self, number: int, message: T) -> None:
        waits = bool(self._early)
        self._early[number] = message
        while self._taken in self._early:
            self._taken += 1
            self._take(self._early.pop(self._taken - 1))
        if self._early and not waits:
            self._loop.call_later(LOST_S, self._check, self._taken)

    def _check(self, missing: int) -> None:
        if self._taken == missing:
            self.close()
            self._on_lost()
        elif self._early:
            self._loop.call_later(LOST_S, self._check, self._taken)


def deliver(actor: object, name: str, number: int, message: object) -> None:
    """Puts a message into an inbox of this process; dropped if it is closed. Called by Ray, with the actor."""
    with _lock:
        if (inbox := _inboxes.get(name)) is not None:
            inbox.put(number, message)


@dataclass(slots=True)
class Address(Generic[T]):
    """An inbox, for its sender in another process."""

    actor: Any
    """Handle of the actor in whose process it is."""
    name: str
    sent: int = field(default=0, compare=False)
    """Number of messages sent."""
    _method: Any = field(default=None, compare=False, repr=False)

    def post(self, message: T) -> None:
        """Sends a message. Returns at once.

        Raises:
            RayError: the actor is known to be gone. Exceptions of pickling.
        """
        if self._method is None:
            self._method = self.actor.__ray_call__.options(num_returns=0)
        self._method.remote(deliver, self.name, self.sent, message)
        self.sent += 1

    def __getstate__(self) -> tuple[Any, str]:
        return self.actor, self.name

    def __setstate__(self, state: tuple[Any, str]) -> None:
        self.actor, self.name = state
        self.sent, self._method = 0, None
