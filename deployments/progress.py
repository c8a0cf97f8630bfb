"""How far engines are with their start, in the cluster's key-value store.

Serve only says that a process is starting. A launcher reads the rest here, whichever node the engine is on, and
whichever driver started Serve.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass

from ray import serve
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from twinkle_serve.engines.stages import Stage

NAMESPACE = b"twinkle_serve"


@dataclass(frozen=True, slots=True)
class StartProgress:
    """Stages that an engine has begun, in order."""

    stages: tuple[tuple[str, float], ...]
    """Stage, and when it began: seconds since the epoch, by the clock of the engine's node."""


class StageReporter:
    """An `OnStage` that publishes the stages of this replica; they replace those of the replica before it."""

    def __init__(self) -> None:
        context = serve.get_replica_context()
        self._key = _key(context.app_name, context.deployment)
        self._stages: list[tuple[str, float]] = []

    def __call__(self, stage: Stage) -> None:
        self._stages.append((stage, time.time()))
        with contextlib.suppress(Exception):  # only a display reads it
            _internal_kv_put(self._key, json.dumps(self._stages), namespace=NAMESPACE)


def read_progress(application: str, deployment: str) -> StartProgress | None:
    """The latest report of a deployment's replica; None where none has reported."""
    value = _internal_kv_get(_key(application, deployment), namespace=NAMESPACE)
    return None if value is None else StartProgress(tuple((stage, began) for stage, began in json.loads(value)))


def _key(application: str, deployment: str) -> str:
    return json.dumps(["start", application, deployment])
