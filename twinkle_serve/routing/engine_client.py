"""How a router reaches an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, Protocol

from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group, Session, TextDelta
from twinkle_serve.engines.base import Finished


class EngineClient(Protocol):
    """One engine, in this process (`EngineServer`) or in another.

    Every call raises EngineDeadError where the engine's process, or what samples in it, is gone, and other
    TwinkleServeErrors as the engine does.
    """

    async def describe(self, router: str) -> EngineInfo:
        """What must be known to use it. `incarnation` differs between a process and the one that replaces it.

        Says too that a router is there: what one has sent that does not say so for CLAIM_S is aborted.
        """

    async def submit(self, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        """Has a chunk sampled; what comes of it is among the `results` of the session. `more` says that others wait at
        the router for places.

        The session is with the process that the chunk is meant for; another one raises EngineDeadError.
        """

    def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        """What was submitted, as it ends, until nothing has run for LINGER_S: every sample is in one item, unless its
        group failed or was aborted. One reader at a time; closing it aborts what still runs.
        """

    def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        """Samples a group of one sample, handing out its text as it comes. Closing it aborts the sample."""

    async def abort(self, session: Session, attempts: Iterable[Attempt]) -> None:
        """Aborts groups, if they still run. They come back in no item."""

    async def control(self, method: str, *args: Any) -> Any:
        """Calls one of `EngineServer`'s CONTROLS."""
