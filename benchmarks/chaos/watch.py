"""Tracks which engines are ready."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from twinkle_serve.data_format.status import SamplerStatus

PERIOD_S = 0.2
PATIENCE_S = 5.0
"""Timeout of a poll."""
KNOWN_S = 2.0
"""How long an answer stays valid when the next one does not come: the router may be gone."""


@dataclass(frozen=True, slots=True)
class Poll:
    """The reported states of the engines. A service that does not answer has none ready."""

    at: float
    """Seconds of time.monotonic."""
    states: Mapping[str, str]
    """State of each engine, by name."""

    @property
    def ready(self) -> frozenset[str]:
        return frozenset(name for name, state in self.states.items() if state == "ready")


class Watch(threading.Thread):
    """Polls the service's status."""

    def __init__(self, router: DeploymentHandle, engines: int) -> None:
        super().__init__(name="watch", daemon=True)
        self._router, self._engines = router, engines
        self._end = threading.Event()
        self.polls: list[Poll] = []

    def run(self) -> None:
        while not self._end.wait(PERIOD_S):
            status = self.status()
            states = {} if status is None else {name: e["state"] for name, e in status["engines"].items()}
            self.polls.append(Poll(time.monotonic(), states))

    def status(self) -> SamplerStatus | None:
        """The service's status; None if it does not answer."""
        try:
            answer = self._router.status.remote()
            status: SamplerStatus = answer.result(timeout_s=PATIENCE_S)
        except TimeoutError:
            answer.cancel()
            return None
        except (RayError, RayServeException):
            return None
        return status

    def stop(self) -> None:
        self._end.set()
        self.join()

    @property
    def ready(self) -> frozenset[str]:
        """Names of the ready engines, as of the last poll."""
        return self.polls[-1].ready if self.polls else frozenset()

    def all_ready_since(self, now: float | None = None) -> float | None:
        """Time since which all engines have been ready; None if they are not."""
        since, after = None, time.monotonic() if now is None else now
        for poll in reversed(self.polls):
            if len(poll.ready) < self._engines or after - poll.at > KNOWN_S:
                break
            since = after = poll.at
        return since

    def told(self, begin: float) -> str:
        """Describes the changes of the engines' states since then, to explain a slow recovery."""
        polls = [poll for poll in self.polls if poll.at >= begin]
        changes = polls[:1]
        for before, poll in pairwise(polls):
            if poll.at - before.at > KNOWN_S:
                changes.append(Poll(before.at + KNOWN_S, {}))
            if poll.states != changes[-1].states:
                changes.append(poll)
        return "; ".join(f"{poll.at - begin:.1f} s {_said(poll)}" for poll in changes)

    def engine_seconds(self, begin: float, end: float) -> float:
        """Seconds that engines were ready, summed over engines."""
        return sum(len(poll.ready) * seconds for poll, seconds in self._spans(begin, end))

    def outage_s(self, begin: float, end: float) -> float:
        """Seconds without any engine that is known to be ready."""
        return (end - begin) - sum(seconds for poll, seconds in self._spans(begin, end) if poll.ready)

    def _spans(self, begin: float, end: float) -> Iterator[tuple[Poll, float]]:
        """Yields each poll with the seconds for which it is valid, within a period."""
        for poll, after in pairwise([*self.polls]):
            seconds = min(after.at, poll.at + KNOWN_S, end) - max(poll.at, begin)
            if seconds > 0:
                yield poll, seconds


def _said(poll: Poll) -> str:
    return ", ".join(f"{name} {state}" for name, state in poll.states.items()) or "no answer"
