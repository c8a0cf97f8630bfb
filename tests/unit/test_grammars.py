"""Checks of structured outputs in a helper process, without vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.support.eventually import eventually, wait_until
from tests.support.grammar_stub import CHECKS
from tests.support.processes import has_ended
from twinkle_serve.engines.vllm import grammars
from twinkle_serve.engines.vllm.grammars import GrammarChecks
from twinkle_serve.engines.vllm.tmpfs import EngineFiles
from twinkle_serve.errors import EngineDeadError, EngineError, SamplingParamsError

STUB = "from tests.support.grammar_stub import main; main()"


class _Model(SimpleNamespace):
    def get_vocab_size(self) -> int:
        return 262


def _config() -> Any:
    """The part of a VllmConfig that is read."""
    return SimpleNamespace(
        model_config=_Model(
            tokenizer="demo",
            tokenizer_mode="auto",
            tokenizer_revision=None,
            trust_remote_code=False,
            skip_tokenizer_init=False,
            runner_type="generate",
            is_diffusion=False,
            hf_config=SimpleNamespace(model_type="qwen3"),
        ),
        structured_outputs_config=SimpleNamespace(
            backend="xgrammar", disable_any_whitespace=False, disable_additional_properties=False
        ),
        speculative_config=None,
    )


@pytest.fixture
async def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[GrammarChecks]:
    monkeypatch.setattr(grammars, "BOOT", STUB)
    monkeypatch.setenv(CHECKS, str(tmp_path / "checks"))
    files = EngineFiles()
    made = GrammarChecks(_config(), files.owner, limit_s=1, memory_bytes=2**26)
    yield made
    await made.close()
    files.close()


def _checked(tmp_path: Path) -> list[str]:
    """The specifications that were checked, in turn."""
    return (tmp_path / "checks").read_text().splitlines()


def _helpers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if STUB in child.cmdline()]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("invalid", r"structured_outputs\.regex is refused by .* xgrammar: no such rule\. Correct it\."),
        ("slow", r"structured_outputs\.regex takes more than 1 s of CPU time to be compiled\. Simplify it: .*guidance"),
        ("memory", r"structured_outputs\.regex takes more than 64 MiB to be compiled\. Simplify it"),
        ("abort", r"structured_outputs\.regex takes more than 64 MiB to be compiled\."),
        ("crash", r"structured_outputs\.regex crashes vLLM's grammar backend xgrammar \(signal 11\)\."),
    ],
)
async def test_refusal_names_the_kind_the_reason_and_the_remedy(checks: GrammarChecks, spec: str, message: str) -> None:
    with pytest.raises(SamplingParamsError, match=message):
        await checks.check("regex", spec)
    await checks.check("regex", "valid")


async def test_check_that_waits_for_cores_ends_too(checks: GrammarChecks) -> None:
    with pytest.raises(SamplingParamsError, match=r"was not compiled in 4 s\. Are all cores busy\?"):
        await checks.check("regex", "asleep")


async def test_specifications_that_blow_up_delay_others_and_fail_none(checks: GrammarChecks) -> None:
    """Four of them fill the helper twice over. The valid one behind them starts as the second two do, and its own time
    begins then."""
    bad = [asyncio.create_task(checks.check("regex", f"slow {i}")) for i in range(4)]
    await asyncio.sleep(0)
    await checks.check("regex", "valid")
    outcomes = await asyncio.gather(*bad, return_exceptions=True)
    assert all(isinstance(outcome, SamplingParamsError) for outcome in outcomes)


async def test_equal_specifications_are_checked_once(checks: GrammarChecks, tmp_path: Path) -> None:
    """Those that come together, those that come later, and those that are refused; the kind counts too."""
    await asyncio.gather(*(checks.check("regex", "valid") for _ in range(100)))
    await checks.check("regex", "valid")
    await checks.check("grammar", "valid")
    for _ in range(2):
        with pytest.raises(SamplingParamsError, match="no such rule"):
            await checks.check("regex", "invalid")
    assert _checked(tmp_path) == ["valid", "valid", "invalid"]


async def test_cancelled_call_cancels_no_other_call_with_its_specification(checks: GrammarChecks) -> None:
    await checks.check("regex", "valid")  # the helper is up
    first, second = (asyncio.create_task(checks.check("regex", "invalid")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(SamplingParamsError, match="no such rule"):
        await second
    assert first.cancelled()


async def test_event_loop_runs_while_specifications_are_checked(checks: GrammarChecks) -> None:
    """A bystander is never kept waiting by a large specification either."""
    longest, running = 0.0, True

    async def tick() -> None:
        nonlocal longest
        while running:
            began = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - began)

    ticking = asyncio.create_task(tick())
    with pytest.raises(SamplingParamsError):
        await checks.check("regex", "slow" + "x" * 2**20)
    running = False
    await ticking
    assert longest < 0.3  # some ms where the machine does nothing else


async def test_killed_helper_is_replaced(checks: GrammarChecks) -> None:
    """With a check in progress and without one."""
    await checks.check("regex", "one")
    running = asyncio.create_task(checks.check("regex", "slow"))
    [helper] = _helpers()
    await eventually(lambda: bool(helper.children()))
    [check] = helper.children()
    helper.kill()
    with pytest.raises(SamplingParamsError, match="takes more than 1 s"):
        await running
    await eventually(lambda: has_ended(check))
    [replaced] = _helpers()
    assert replaced.pid != helper.pid
    replaced.kill()
    await checks.check("regex", "two")


async def test_specification_that_kills_helpers_is_an_error_of_the_engine(checks: GrammarChecks) -> None:
    with pytest.raises(EngineError, match="was killed repeatedly"):
        await checks.check("regex", "killed helper")
    await checks.check("regex", "valid")


async def test_helper_that_does_not_start_says_why(checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next check tries again."""
    monkeypatch.setattr(grammars, "BOOT", STUB.replace("main", "fail"))
    with pytest.raises(EngineError, match=r"does not start: ImportError: no vllm\."):
        await checks.check("regex", "valid")
    monkeypatch.setattr(grammars, "BOOT", "raise SystemExit")
    with pytest.raises(EngineError, match="does not start: it was killed"):
        await checks.check("regex", "valid")
    monkeypatch.setattr(grammars, "BOOT", STUB)
    await checks.check("regex", "valid")


@pytest.mark.parametrize("starting", [False, True])
async def test_no_process_is_left_after_close(checks: GrammarChecks, starting: bool) -> None:
    if not starting:
        await checks.check("regex", "valid")
    running = asyncio.create_task(checks.check("regex", "slow"))
    await eventually(lambda: any(starting or helper.children() for helper in _helpers()))
    left = [process for helper in _helpers() for process in (helper, *helper.children())]
    await checks.close()
    with pytest.raises(EngineDeadError, match="the engine is stopped"):
        await running
    await eventually(lambda: all(map(has_ended, left)))  # a kill takes a moment
    with pytest.raises(EngineDeadError, match="the engine is stopped"):
        await checks.check("regex", "another")
    await checks.close()


async def test_helper_starts_with_the_first_check(checks: GrammarChecks) -> None:
    assert not _helpers()
    await checks.check("regex", "valid")
    assert len(_helpers()) == 1


OWNER = """
import asyncio, os
from tests.unit.test_grammars import STUB, _config, _helpers
from twinkle_serve.engines.vllm import grammars
from twinkle_serve.engines.vllm.tmpfs import EngineFiles

async def main():
    grammars.BOOT = STUB
    checks = grammars.GrammarChecks(_config(), EngineFiles().owner, limit_s=60)
    await checks.check("regex", "valid")
    running = asyncio.create_task(checks.check("regex", "slow"))
    while not (children := _helpers()[0].children()):
        await asyncio.sleep(0.01)
    print(_helpers()[0].pid, children[0].pid, flush=True)
    await running

asyncio.run(main())
"""


def test_helper_and_its_checks_end_with_their_owner(tmp_path: Path) -> None:
    """Though it is killed."""
    environment = {
        **os.environ,
        CHECKS: str(tmp_path / "checks"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert owner.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    assert len(processes) == 2
    owner.kill()
    assert owner.wait() == -signal.SIGKILL
    wait_until(lambda: all(map(has_ended, processes)), "they have ended")
