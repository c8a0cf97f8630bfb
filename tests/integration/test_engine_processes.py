"""vLLM's processes when those around them are killed or interrupted: nothing outlives its parent, and Ctrl-C is for the
caller alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import psutil
import pytest

from tests.support.eventually import wait_until
from tests.support.processes import core_processes
from tests.support.scripts_serve import own_environment

pytestmark = [pytest.mark.vllm, pytest.mark.nightly]

ARGS = "{'max_model_len': 256, 'dtype': 'float32', 'kv_cache_memory_bytes': 2**27}"
START_S = 180.0
SOON_S = 15.0
"""Ray notices the death of its raylet within 10 s."""


@contextlib.contextmanager
def running(
    tmp_path: Path, text: str, environment: dict[str, str] | None = None, stderr: TextIO | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Runs a script in its own process group, and kills what remains of the group."""
    script = tmp_path / "script.py"
    script.write_text(text)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env=environment,
    )
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        for member in [*family, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def gone(processes: list[psutil.Process], within_s: float = SOON_S) -> None:
    """All of them end in time; none is left to others."""
    try:
        wait_until(lambda: not any(runs(process.pid) for process in processes), "all have ended", within_s)
    finally:
        for survivor in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()


def runs(pid: int) -> bool:
    """Whether a process is there, and not as a zombie, which its parent has not asked after."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("stage", ["starting", "ready"])
def test_engine_ends_when_its_caller_is_killed(tmp_path: Path, stage: str) -> None:
    """An in-process vLLMSampler: its processes end, also while they import vLLM."""
    text = (
        "import time\nfrom twinkle_serve import vLLMSampler\n"
        f"if __name__ == '__main__':\n    sampler = vLLMSampler('demo', {ARGS})\n    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with running(tmp_path, text) as process:
        caller = psutil.Process(process.pid)
        if stage == "ready":
            assert line_of(process) == "ready\n"
        wait_until(lambda: bool(core_processes(caller)), "the engine's process is there", START_S)
        engine = [member for core in core_processes(caller) for member in [core, *core.children(recursive=True)]]
        process.kill()
        # A process that imports vLLM ends when it has: 10 s, and several times that on busy cores.
        gone(engine, START_S if stage == "starting" else SOON_S)


REPLACED = f"""
import os, sys
import psutil
from twinkle_serve import vLLMSampler
if __name__ == "__main__":
    sampler = vLLMSampler("demo", {ARGS})
    if (child := os.fork()) == 0:
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    samples = len(sampler.sample({{"input_ids": [20, 21]}}, {{"max_tokens": 2}}).sequences)
    print(code, samples, *(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    sys.stdin.readline()
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"])
"""


def test_engine_outlives_a_fork_of_its_caller_and_ends_when_the_caller_replaces_itself(tmp_path: Path) -> None:
    """The fork exits without a word, and the caller samples on. By `exec` it has the same process id."""
    errors = tmp_path / "errors"
    with errors.open("w") as file, running(tmp_path, REPLACED, stderr=file) as process:
        code, samples, *engine = map(int, line_of(process).split())
        assert (code, samples) == (0, 1) and len(engine) >= 2
        assert "Traceback" not in errors.read_text()
        assert process.stdin is not None
        process.stdin.close()
        wait_until(lambda: not any(map(runs, engine)), "the engine has ended", SOON_S)
        assert process.poll() is None


INTERRUPTED = f"""
import signal
from twinkle_serve import vLLMSampler
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process of a shell ignores it
    try:
        vLLMSampler("demo", {ARGS})
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_ctrl_c_while_the_engine_starts_ends_the_start(tmp_path: Path) -> None:
    """The caller gets its KeyboardInterrupt, nothing goes on loading, and the script can end."""
    with running(tmp_path, INTERRUPTED) as process:
        caller = psutil.Process(process.pid)

        def leads_its_group() -> bool:
            return any(os.getpgid(core.pid) == core.pid for core in core_processes(caller))

        wait_until(leads_its_group, "the engine's process has begun", START_S)
        engine = [member for core in core_processes(caller) for member in [core, *core.children(recursive=True)]]
        os.killpg(process.pid, signal.SIGINT)
        assert line_of(process) == "interrupted\n"
        gone(engine)
        assert process.wait(START_S) == 0  # Python waits for its thread that imports vLLM


SERVICE = f"""
import time
from twinkle_serve import vLLMSampler
if __name__ == "__main__":
    sampler = vLLMSampler("demo", {ARGS}, remote_group="sampler")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.ray
@pytest.mark.own_cluster
@pytest.mark.parametrize("killed", ["replica", "raylet", "driver"])
def test_engine_of_a_service_ends_with_each_parent(tmp_path: Path, killed: str) -> None:
    """The replica, Ray's raylet, and the process that started Ray: nothing of the service's own is left."""
    with own_environment() as environment, running(tmp_path, SERVICE, environment) as process:
        assert line_of(process) == "ready\n"
        family = psutil.Process(process.pid).children(recursive=True)
        replicas = [member for member in family if "ServeReplica" in "".join(member.cmdline()[:1])]
        assert len(replicas) == 3
        (replica,) = [member for member in replicas if core_processes(member)]
        engine = [member for core in core_processes(replica) for member in [core, *core.children(recursive=True)]]
        assert engine, family
        raylets = [member for member in family if member.name() == "raylet"]
        assert len(raylets) == 1
        victims = {"replica": replica, "raylet": raylets[0], "driver": psutil.Process(process.pid)}
        victims[killed].kill()
        gone(engine if killed == "replica" else [*engine, *replicas])


BROKEN = f"""
from twinkle_serve import DeviceMesh, vLLMSampler

def break_model(worker):
    def execute_model(*args):
        rows = 3
        assert rows == 4
    worker.model_runner.execute_model = execute_model

if __name__ == "__main__":
    sampler = vLLMSampler("demo", {ARGS}, device_mesh=DeviceMesh.from_sizes(device_type="cpu", tp_size=WORKERS))
    service = sampler._client._service
    service.loop.call(service._server._engine._llm.collective_rpc(break_model))
    for _ in range(2):
        try:
            sampler.sample({{"input_ids": [20]}}, {{"max_tokens": 2}})
        except Exception as error:
            print(error)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_engine_that_its_worker_ended_says_why(tmp_path: Path, workers: int) -> None:
    """With the error of the worker itself, though it has no text. A worker that is alone runs in the core."""
    environment = {**os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    with running(tmp_path, BROKEN.replace("WORKERS", str(workers)), environment) as process:
        said = [line_of(process) for _ in range(2)]
    for line in said:
        assert "vLLM's engine process died" in line and "Make a new sampler." in line
        assert "after AssertionError (in script.py:" in line and "assert rows == 4)" in line


def test_script_without_a_main_guard_says_what_to_write(tmp_path: Path) -> None:
    """In the caller's own error, wherever in the script the sampler is made."""
    script = tmp_path / "script.py"
    script.write_text(
        "from twinkle_serve import vLLMSampler\n\n"
        "class Trainer:\n"
        f"    def __init__(self):\n        self.sampler = vLLMSampler('demo', {ARGS})\n\n"
        "trainer = Trainer()\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=START_S, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "EngineStartError" in last and 'below `if __name__ == "__main__":`' in last, result.stderr
