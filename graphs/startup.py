"""Progress of a start: steps for Ray, Serve and each deployment. Pure bookkeeping."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

    from deployments.progress import StartProgress
    from graphs.observer import Snapshot

NO_ROOM = "to be scheduled"
"""Part of Serve's message while a deployment lacks resources (ray 2.60, serve/_private/deployment_state.py)."""

SHOWN_S = 0.1
"""Stages that took less are left out."""


@dataclass
class Step:
    """One line of the start."""

    name: str
    """Ray, Serve, an application, or a deployment's name."""
    application: str = ""
    """Of a deployment."""
    stage: str = "starting"
    began: float = field(default_factory=time.monotonic)
    stage_began: float = field(default_factory=time.monotonic)
    earlier: list[tuple[str, float]] = field(default_factory=list)
    """Stages that are over, and how long each took, s."""
    done: str = "ready"
    """Its last stage."""
    outcome: Literal["running", "ready", "failed"] = "running"
    ended: float | None = None

    def enter(self, stage: str, now: float, earlier: list[tuple[str, float]] | None = None) -> bool:
        """Enters a stage. Returns whether it is a new one.

        Args:
            earlier: the stages before it where they were measured, else the last one ends now.
        """
        if stage == self.stage:
            return False
        if earlier is None:
            earlier = [*self.earlier, (self.stage, now - self.stage_began)]
        self.earlier = [(name, took_s) for name, took_s in earlier if took_s >= SHOWN_S]
        self.stage, self.stage_began = stage, now
        return True

    def end(self, outcome: Literal["ready", "failed"], now: float) -> bool:
        """Ends it; returns whether it is new."""
        if self.outcome == outcome:
            return False
        stage = self.done if outcome == "ready" else outcome
        if self.outcome == "running":
            self.enter(stage, now)
            self.ended = now
        self.outcome, self.stage = outcome, stage
        return True

    def seconds(self, now: float) -> float:
        return (now if self.ended is None else self.ended) - self.began


class StartUp:
    """The steps of a start, in the order in which they are shown."""

    def __init__(self, applications: Mapping[str, bool], on_change: Callable[[Step], None] = lambda step: None) -> None:
        """
        Args:
            applications: by name, whether each is a sampler.
            on_change: called with each step that begins, enters a stage or ends.
        """
        self.steps: list[Step] = []
        self._samplers = applications
        self._on_change = on_change
        self._by_deployment: dict[tuple[str, str], Step] = {}
        self._reported_from: dict[tuple[str, str], float] = {}

    def begin(self, name: str) -> Step:
        step = Step(name)
        self.steps.append(step)
        self._on_change(step)
        return step

    def end(self, step: Step, outcome: Literal["ready", "failed"] = "ready", now: float | None = None) -> None:
        if step.end(outcome, time.monotonic() if now is None else now):
            self._on_change(step)

    def update(self, before: Snapshot, snapshot: Snapshot) -> None:
        """Applies a snapshot.

        Args:
            before: from before the applications were submitted: what is still as it was then says nothing.
        """
        now = snapshot.taken_at
        for name in self._samplers:
            application = snapshot.applications.get(name)
            if application is None or not is_new(name, application, before):
                continue
            building = self._step(name, "", now)
            if application.deployments:
                self.end(building, now=now)
            elif application.status == "DEPLOY_FAILED":
                self.end(building, "failed", now)
            for deployment in sorted(application.deployments, key=_order):
                self._update_deployment(name, deployment, before, snapshot)

    def _update_deployment(self, name: str, deployment: str, before: Snapshot, snapshot: Snapshot) -> None:
        now, key = snapshot.taken_at, (name, deployment)
        state = snapshot.applications[name].deployments[deployment]
        step = self._step(name, deployment, now)
        waits = self._samplers[name] and deployment == "router" and name not in snapshot.in_use
        if step.outcome == "running":
            progress = snapshot.progress.get(key)
            if progress is not None and progress != before.progress.get(key):
                stage, earlier = progress.stages[-1][0], self._measured(step, progress, now)
                if stage == step.done:  # shown by its end, once Serve calls it healthy
                    step.enter(stage, now, earlier)
                else:
                    self._enter(step, stage, now, earlier)
        if state.status == "DEPLOY_FAILED":
            self.end(step, "failed", now)
        elif state.status == "HEALTHY" and not waits:
            self.end(step, now=now)
        elif state.status == "HEALTHY":
            self._enter(step, "waiting for the engines", now)
        elif NO_ROOM in state.message and step.stage == "starting":
            self._enter(step, "waiting for room on the cluster", now)

    def _measured(self, step: Step, progress: StartProgress, now: float) -> list[tuple[str, float]]:
        """The stages before the last one: durations by the engine's clock, but for the time before it had one."""
        key = (step.application, step.name)
        first = self._reported_from.setdefault(key, now)
        times = [began for _, began in progress.stages]
        names = [stage for stage, _ in progress.stages]
        took_s = [later - began for began, later in itertools.pairwise(times)]
        return [("starting", first - step.began), *zip(names, took_s, strict=False)]

    def _enter(self, step: Step, stage: str, now: float, earlier: list[tuple[str, float]] | None = None) -> None:
        if step.enter(stage, now, earlier):
            self._on_change(step)

    def _step(self, application: str, deployment: str, now: float) -> Step:
        """The application's own while it has no deployments yet: it is being built."""
        key = (application, deployment)
        if key not in self._by_deployment:
            step = Step(deployment, application, began=now, stage_began=now)
            if not deployment:
                step = Step(application, stage="building", began=now, stage_began=now, done="built")
            self._by_deployment[key] = step
            self.steps.append(step)
            self._on_change(step)
        return self._by_deployment[key]


def is_new(name: str, application: ApplicationStatusOverview, before: Snapshot) -> bool:
    """Whether it was deployed since `before`; a cluster that we joined may have one from earlier."""
    old = before.applications.get(name)
    return old is None or old.last_deployed_time_s != application.last_deployed_time_s


def _order(deployment: str) -> tuple[int, list[int | str]]:
    """store, engine-dp0, …, engine-dp10, router, as they depend on each other; then others."""
    kind = next((i for i, name in enumerate(("store", "engine-dp", "router")) if deployment.startswith(name)), 3)
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", deployment)]
