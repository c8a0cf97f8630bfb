"""What an exit code of vLLM's process says of why it ended."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from twinkle_serve import hub
from twinkle_serve.engines import build_engine
from twinkle_serve.errors import EngineCrashedError, EngineDeadError


@pytest.mark.parametrize(
    ("codes", "kind"),
    [
        ([-signal.SIGKILL], EngineDeadError),
        ([-signal.SIGTERM], EngineDeadError),
        ([0], EngineDeadError),
        ([], EngineDeadError),
        ([-signal.SIGSEGV], EngineCrashedError),
        ([-signal.SIGABRT], EngineCrashedError),
        ([1], EngineCrashedError),
        ([None], EngineCrashedError),
        ([0, 1], EngineCrashedError),
    ],
)
def test_engine_that_ended_by_itself_is_told_from_one_that_was_killed(
    codes: list[int | None], kind: type[EngineDeadError]
) -> None:
    """A prompt may be to blame for the one, and not for the other. None: it reported a failure and is still ending."""
    engine: Any = build_engine("vllm", "ended", str(hub.DEMO), {})
    manager = SimpleNamespace(processes=[SimpleNamespace(exitcode=code) for code in codes])
    engine._llm = SimpleNamespace(engine_core=SimpleNamespace(resources=SimpleNamespace(engine_manager=manager)))
    assert type(engine._dead_error()) is kind
