"""A router's lease on the groups that it has sent to an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from twinkle_serve import timing
from twinkle_serve.data_format.groups import Session
from twinkle_serve.engines.group_runner import GroupRunner
from twinkle_serve.lease import Lease


class RouterLease:
    """Keeps the groups of one session running until its router has been silent for ROUTER_LEASE_S."""

    def __init__(self, session: Session, runner: GroupRunner, abandon: Callable[[str], None]) -> None:
        """
        Args:
            runner: runs the groups of this session.
            abandon: called with the router's id when the lease expires.
        """
        self.session, self.runner = session, runner
        self.at_end: list[Callable[[], None]] = []
        """Called when this ends."""
        self.streams: set[asyncio.Event] = set()
        """One event per text stream; set when the stream must end."""
        self._lease = Lease(lambda: abandon(session.router))
        self.renew()

    def renew(self) -> None:
        """Extends the lease: the router was heard of."""
        self._lease.renew(timing.ROUTER_LEASE_S)

    def close(self) -> None:
        """Ends the lease and aborts everything that was sent under it."""
        self._lease.end()
        self.runner.close()
        for stream in self.streams:
            stream.set()
        for end in self.at_end:
            end()
