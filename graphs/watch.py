"""Events of applications after the start, a line for each. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

    from graphs.observer import Snapshot

SILENT_S = 20.0
"""Serve's controller is back within 10 to 17 s after it was killed, on two busy cores."""

State = Literal["ready", "replaced", "unhealthy", "failed", "deleted"]


class Watch:
    """Compares snapshots with the reported state."""

    def __init__(self, applications: Mapping[str, bool], ready: Snapshot) -> None:
        """
        Args:
            applications: by name, whether each is a sampler.
            ready: the first snapshot in which all of them were ready.
        """
        self._samplers = applications
        self._state: dict[str, State] = dict.fromkeys(applications, "ready")
        self._since = dict.fromkeys(applications, ready.taken_at)
        self._deployed_at = {name: ready.applications[name].last_deployed_time_s for name in applications}
        self._said: dict[str, frozenset[str]] = {}
        """Unhealthy deployments that were named, by application."""
        self._silent = False

    def silence(self, seconds: float) -> list[str]:
        """Lines to print after so long a silence."""
        if seconds < SILENT_S or self._silent:
            return []
        self._silent = True
        return [f"Serve has not answered for {seconds:.0f} s. Its processes, or Ray's, may have ended."]

    def update(self, snapshot: Snapshot) -> list[str]:
        """Lines for a snapshot."""
        lines = ["Serve answers again."] if self._silent else []
        self._silent = False
        for name in self._samplers:
            application = snapshot.applications.get(name)
            if application is None or application.status == "DELETING":
                if self._state[name] != "deleted":
                    self._enter(name, "deleted", snapshot)
                    lines.append(f"{name} was deleted: calls to it fail. Ctrl-C ends this launcher.")
            else:
                lines += self._update(name, application, snapshot)
        return lines

    def _update(self, name: str, application: ApplicationStatusOverview, snapshot: Snapshot) -> list[str]:
        lines = []
        if application.last_deployed_time_s != self._deployed_at[name]:
            self._deployed_at[name] = application.last_deployed_time_s
            self._enter(name, "replaced", snapshot)
            lines.append(f"{name} was deployed again: changed parts are being replaced.")
        if application.status == "DEPLOY_FAILED":
            if self._state[name] != "failed":
                self._enter(name, "failed", snapshot)
                lines.append(f"{name} failed to deploy. {reason(application)}")
        elif application.status == "UNHEALTHY":
            sick = frozenset(d for d, state in application.deployments.items() if state.status == "UNHEALTHY")
            if self._state[name] != "unhealthy":
                self._enter(name, "unhealthy", snapshot)
                self._said[name] = frozenset()
            if new := sick - self._said[name]:
                self._said[name] |= new
                lines.append(f"{name} is unhealthy: {'; '.join(_ailment(application, d) for d in sorted(new))}")
        elif application.status == "RUNNING" and (name in snapshot.in_use or not self._samplers[name]):
            took_s = snapshot.taken_at - self._since[name]
            if (last := self._state[name]) != "ready":
                self._enter(name, "ready", snapshot)
                word = "healthy" if last == "unhealthy" else "ready"
                lines.append(f"{name} is {word} again after {took_s:.0f} s.")
        return lines

    def _enter(self, name: str, state: State, snapshot: Snapshot) -> None:
        if state == "replaced" or self._state[name] == "ready":
            self._since[name] = snapshot.taken_at
        self._state[name] = state


def _ailment(application: ApplicationStatusOverview, deployment: str) -> str:
    message = " ".join(application.deployments[deployment].message.split()).split(". ")[0]
    return f"{deployment}{f' ({message})' if message else ''}"


def reason(application: ApplicationStatusOverview) -> str:
    from twinkle_serve.sampler.connect import failure_reason

    return failure_reason(application)
