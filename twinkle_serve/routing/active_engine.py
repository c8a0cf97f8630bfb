"""One use of an engine by its router. Free of Ray."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, TypeVar

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import EngineInfo, GroupKey, Session
from twinkle_serve.data_format.telemetry import EngineLoad
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.errors import EngineDeadError

T = TypeVar("T")

EngineState: TypeAlias = Literal["starting", "catching up", "ready", "draining", "drained", "dead"]
"""starting: has not answered yet. catching up: answers, and loads the current weights. ready: in use. draining:
finishes its samples, for a pause or because it gets no more groups. drained: kept out of use. dead: was in use, and no
longer answers."""


@dataclass(eq=False, slots=True)
class ActiveEngine:
    """One use of an engine, from when it is ready until it is lost. It holds the current weights, or is paused."""

    name: str
    client: EngineClient
    info: EngineInfo
    session: Session
    progressed_at: float
    """When it last produced tokens, or had nothing to sample."""
    progress: int = -1
    load: EngineLoad = field(default_factory=EngineLoad)
    """At the last probe."""
    placed_at: dict[int, float] = field(default_factory=dict)
    """When each of its groups was sent, by group id."""
    adapters: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    """Loads of adapter versions, running and done, by version id."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when this use ends."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is cordoned and has finished its groups."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """Senders of groups and the receiver of results. They end with this use."""
    sent: set[GroupKey] = field(default_factory=set)
    """Groups that it has accepted since `results` was last called."""
    has_sent: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `sent` is not empty."""

    def has_adapter(self, version: AdapterVersion | None) -> bool:
        """Whether a version is loaded; True for the base model, None."""
        return version is None or self.has_loaded(version.id)

    def has_loaded(self, version_id: int) -> bool:
        """Whether an adapter version is loaded."""
        loading = self.adapters.get(version_id)
        return loading is not None and loading.done() and not loading.cancelled() and loading.exception() is None

    async def unless_lost(self, call: Awaitable[T]) -> T:
        """Awaits a call to this engine, but not after the engine was given up: a hung engine never answers.

        The call has an empty context, as in `BackgroundTasks.spawn`: Serve would cancel it together with the request,
        and that looks like the engine's death.

        Raises:
            EngineDeadError: the engine is gone, or was lost meanwhile.
        """

        async def answered() -> T:
            return await call

        answer = asyncio.get_running_loop().create_task(answered(), context=contextvars.Context())
        lost = asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise EngineDeadError(f"{self.name} stopped answering.")
        finally:
            lost.cancel()
            if not answer.done():
                answer.cancel()
                await asyncio.wait({answer}, timeout=1.0)


class EngineListener(Protocol):
    """Gives engines work. It hears of each engine that comes into use, and of its end."""

    def engine_begins(self, engine: ActiveEngine) -> None:
        """The engine may be given groups."""

    def engine_closes(self, name: str) -> None:
        """The engine gets no new groups and finishes its own. Idempotent, also for engines not in use."""

    def engine_opens(self, name: str) -> None:
        """Reverts `engine_closes`."""

    def engine_ends(self, engine: ActiveEngine, error: BaseException | None) -> None:
        """The engine is no longer in use; its unfinished groups must go elsewhere.

        Args:
            error: the reason of the loss; None if the engine is alive.
        """

    def sequences_of(self, name: str) -> int:
        """Returns the number of unfinished sequences that an engine in use was sent."""
        ...
