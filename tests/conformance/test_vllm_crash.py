"""The engine of the other tests crashes, after all of them."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import pytest

from tests.support.eventually import eventually
from tests.support.harness import EngineHarness, Prompts
from twinkle_serve.errors import EngineCrashedError

pytestmark = [pytest.mark.vllm, pytest.mark.ends_engine]


async def test_error_of_a_worker_comes_with_its_type_and_place(vllm_engine: EngineHarness) -> None:
    """vLLM passes on its text alone, which may be empty."""
    engine: Any = vllm_engine.engine
    with pytest.raises(Exception, match="No such file"):
        await engine._llm.collective_rpc("load_weights", args=("/no/such/file",))
    assert re.match(r"FileNotFoundError: .*/no/such/file.* \(in \S+\.py:\d+, ", engine._reported())


async def test_engine_that_crashed_says_so(vllm_engine: EngineHarness, prompts: Prompts) -> None:
    """A prompt may be to blame for it; tests/unit/test_exit_codes.py has the other exit codes."""
    engine: Any = vllm_engine.engine
    before = engine.progress()
    call = vllm_engine.start(vllm_engine.group(prompts[0], max_tokens=200, ignore_eos=True))
    await eventually(lambda: engine.progress() != before)
    (core,) = engine._llm.engine_core.resources.engine_manager.processes
    # A handler of another signal, such as SIGSEGV, may find a lock taken by the thread that it stops, and never end.
    os.kill(core.pid, signal.SIGSYS)
    with pytest.raises(EngineCrashedError, match=f"exit code -{signal.SIGSYS:d}"):
        await call
