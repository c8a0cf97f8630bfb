"""A sampler in this process, on the fake engine: what its forks and other processes see."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.local_sampler import QUESTION, soon
from tests.support.samplers import FakeSampler
from twinkle_serve.errors import ConfigError, EngineDeadError
from twinkle_serve.sampler import RunningSampler


def test_sampler_does_not_hang_in_a_forked_process(sampler: RunningSampler) -> None:
    """Its thread is not there: a call says so."""
    child = os.fork()
    if not child:
        code = 1
        try:
            sampler.sample(QUESTION, {"max_tokens": 2})
        except EngineDeadError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            os._exit(code)
    assert soon(lambda: os.waitpid(child, 0)) == (child, 0)


SCRIPT = """
import os, signal, sys, time
from tests.support.samplers import FakeSampler
from twinkle_serve.errors import EngineDeadError

sampler = FakeSampler("demo", {"token_latency_s": 0.01})
prompt, endless = {"input_ids": [20, 21]}, {"max_tokens": 900, "ignore_eos": True}
calls = {
    "stream": sampler.sample_stream(prompt, endless),
    "rollouts": sampler.sample_iter([prompt] * 2, endless),
    "pause": sampler.pause(),
}
calls["pause"].resume()
next(calls["stream"])
if (child := os.fork()) == 0:
    signal.alarm(20)  # ends a child that hangs
    reads = {
        "stream": lambda: next(calls["stream"]),
        "rollouts": lambda: next(calls["rollouts"]),
        "cancel": lambda: calls["rollouts"].cancel(),
        "sample": lambda: sampler.sample(prompt, endless),
        "status": sampler.status,
    }
    for name, read in reads.items():
        try:
            read()
        except EngineDeadError as error:
            assert "forked" in str(error), error
            print(name, flush=True)
    calls["rollouts"].close()
    calls["stream"].close()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
next(calls["stream"])
print("cancelled", calls["rollouts"].cancel(), flush=True)
sampler.shutdown()

sampler = FakeSampler("demo", state_dir=sys.argv[1])
if os.fork():
    print("locked", flush=True)
time.sleep(600)  # the child holds whatever its parent has opened
"""
"""Two tests in one: a process that imports the engine takes seconds to start."""


@dataclass(frozen=True)
class Script:
    process: subprocess.Popen[str]
    state_dir: Path
    printed: list[str]
    """Words, up to the sampler that has locked the directory."""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    directory = tmp_path_factory.mktemp("forks")
    path, state = directory / "script.py", directory / "state"
    path.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(path), str(state)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert process.stdout is not None
        printed = " ".join(itertools.takewhile(lambda line: line != "locked\n", process.stdout)).split()
        yield Script(process, state, printed)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_iterators_from_before_a_fork_raise_in_the_child(script: Script) -> None:
    """At once, as every other call does there; in the parent they go on."""
    assert script.printed == ["stream", "rollouts", "cancel", "sample", "status", "cancelled", "2"]


def test_second_sampler_on_a_state_dir_names_the_first(script: Script) -> None:
    """In another process or in this one; it is free once the first one has ended, by itself or killed."""
    pid, state = script.process.pid, script.state_dir
    with pytest.raises(ConfigError, match=f"state_dir .* is in use by pid {pid} on .*name another state_dir"):
        FakeSampler("demo", state_dir=str(state))
    script.process.kill()
    script.process.wait()
    first = FakeSampler("demo", state_dir=f"file://{state}")
    with pytest.raises(ConfigError, match=f"is in use by pid {os.getpid()} "):
        FakeSampler("demo", state_dir=str(state))
    first.shutdown()
    FakeSampler("demo", state_dir=str(state)).shutdown()
