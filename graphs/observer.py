"""Polls the state of the applications in a thread: Serve may answer late or never."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

    from deployments.progress import StartProgress


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The applications of a Serve instance at one time."""

    applications: Mapping[str, ApplicationStatusOverview]
    in_use: Collection[str] = frozenset()
    """Samplers whose router uses all engines; Serve counts an application as running before that."""
    progress: Mapping[tuple[str, str], StartProgress] = field(default_factory=dict)
    """Start progress of engines not yet in use, by application and deployment."""
    taken_at: float = field(default_factory=time.monotonic)


def look(samplers: Collection[str], known_in_use: Mapping[str, float]) -> Snapshot:
    """Asks Serve once.

    Args:
        samplers: applications whose router is asked too.
        known_in_use: when those were deployed that need not be asked again.

    Raises:
        RayError, RayServeException: Serve did not answer.
    """
    from ray import serve

    from deployments.progress import read_progress

    applications = serve.status().applications
    in_use, progress = set(), {}
    for name in applications.keys() & set(samplers):
        application = applications[name]
        known = known_in_use.get(name) == application.last_deployed_time_s
        for deployment in () if known else application.deployments:
            if (stages := read_progress(name, deployment)) is not None:
                progress[name, deployment] = stages
        if application.status == "RUNNING" and (known or _engines_are_in_use(name)):
            in_use.add(name)
    return Snapshot(applications, in_use, progress)


def _engines_are_in_use(name: str) -> bool:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from twinkle_serve.errors import TwinkleServeError
    from twinkle_serve.sampler.client import ServiceClient
    from twinkle_serve.sampler.connect import wait_for_engines

    try:
        wait_for_engines(ServiceClient(serve.get_app_handle(name), name), timeout_s=0)
    except (RayError, RayServeException, TwinkleServeError):
        return False
    return True


class Observer(threading.Thread):
    """Polls Serve."""

    def __init__(self, samplers: Collection[str]) -> None:
        super().__init__(name="observer", daemon=True)
        self._samplers = samplers
        self._end = threading.Event()
        self.period_s = 0.3
        self.latest: Snapshot | None = None
        """None until Serve has answered."""

    def run(self) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        while not self._end.wait(self.period_s):
            try:
                self.latest = look(self._samplers, self._known_in_use())
            except (RayError, RayServeException):
                continue

    def _known_in_use(self) -> dict[str, float]:
        last = self.latest
        return {} if last is None else {name: last.applications[name].last_deployed_time_s for name in last.in_use}

    def stop(self) -> None:
        self._end.set()
        if self.is_alive():
            self.join(timeout=10)
