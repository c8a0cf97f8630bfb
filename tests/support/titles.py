"""A process with the title of vLLM's core. A module of its own, which the process imports in no time."""

from __future__ import annotations

import os
from typing import Any

import setproctitle


def titled(changed: bool, begun: Any, end: Any) -> None:
    """Takes the title of vLLM's core, after changing the first variable of the environment or not."""
    first = next(iter(os.environ))
    if changed:
        os.environ[first] = os.environ[first] + "x"
    setproctitle.setproctitle("VLLM::EngineCore")
    begun.set()
    end.wait(60)
