"""Stages of an engine's start, as it reports them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

Stage: TypeAlias = Literal["fetching", "importing", "loading", "warming", "ready"]
"""fetching: the model from its hub. importing: the engine's library. loading: processes and weights. warming: the first
sample. ready: its start is over."""

OnStage: TypeAlias = Callable[[Stage], None]
"""Called from any thread as each stage begins."""


def ignore_stage(stage: Stage) -> None:
    """An OnStage for callers that do not follow the start."""
