"""Cores of engines on CPU: those of several services on a machine take different ones."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Sequence

logger = logging.getLogger(__name__)

PREFIX = "\0twinkle-serve-core-"
"""Of the socket that a process holds for each of its cores: the system drops it with the process. Processes in
different network namespaces do not see each other's."""


class CoreClaims:
    """The cores that this process has claimed."""

    def __init__(self) -> None:
        self._held: dict[int, socket.socket] = {}

    def take(self, wanted: Sequence[Sequence[int]], allowed: Sequence[int]) -> list[tuple[int, ...]]:
        """Claims cores for devices that compute.

        Args:
            wanted: cores of each device, without other services.
            allowed: cores that this process may use.

        Returns:
            The wanted cores if all are free. Otherwise free ones, if each device gets at least half as many as it
            wanted. Otherwise the wanted ones, shared with other services.
        """
        cores = list(dict.fromkeys(core for device in wanted for core in device))
        others = [core for core in allowed if core not in cores]
        free = [core for core in cores if self._claim(core)]
        if len(free) == len(cores):
            return [tuple(device) for device in wanted]
        for core in others:
            if len(free) == len(cores):
                break
            if self._claim(core):
                free.append(core)
        most = max(map(len, wanted))
        each = min(most, len(free) // len(wanted))
        if 2 * each < most:
            self._release(core for core in free if core not in cores)
            logger.warning(
                f"{len(cores) - len(free)} of the {len(cores)} cores that this engine needs are in use by engines of "
                f"other services, and {len(allowed)} cores are all that it may use: it shares cores {cores}, and both "
                "are slower. Stop the other service, or give this one fewer engines."
            )
            return [tuple(device) for device in wanted]
        self._release(free[each * len(wanted) :])
        taken = sorted(free[: each * len(wanted)])
        return [tuple(taken[i * each : (i + 1) * each]) for i in range(len(wanted))]

    def close(self) -> None:
        """Gives all cores back. Idempotent."""
        self._release(list(self._held))

    def _release(self, cores: Iterable[int]) -> None:
        for core in cores:
            self._held.pop(core).close()

    def _claim(self, core: int) -> bool:
        """Claims a core. Returns whether no other process has it."""
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"{PREFIX}{core}")
        except OSError:
            claim.close()
            return False
        self._held[core] = claim
        return True
