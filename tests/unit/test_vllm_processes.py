"""How vLLM's processes end and report, without vLLM."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.eventually import wait_until
from tests.support.processes import has_ended
from twinkle_serve import hub
from twinkle_serve.engines import build_engine
from twinkle_serve.engines.vllm.args import executor_backend
from twinkle_serve.engines.vllm.processes import IN_CORE, MAY_FORK, METHOD, fork_workers, prefer_spawn
from twinkle_serve.engines.vllm.reports import REPORTS, Reports, describe, report_errors
from twinkle_serve.engines.vllm.tmpfs import EngineFiles
from twinkle_serve.errors import EngineStartError

FAMILY = """
import multiprocessing, os, sys, threading, time
from twinkle_serve.engines.vllm.processes import end_with_owner, end_with_starter
from twinkle_serve.engines.vllm.reports import Reports
from twinkle_serve.engines.vllm.tmpfs import EngineFiles

def worker(started):
    end_with_starter()
    started.send(os.getpid())
    time.sleep(600)

def core(started):
    os.setpgid(0, 0)
    end_with_owner()
    started.send(os.getpid())
    multiprocessing.get_context("spawn").Process(target=worker, args=(started,)).start()
    time.sleep(600)

def start(context, pipe):
    context.Process(target=core, args=(pipe,)).start()

if __name__ == "__main__":
    files = EngineFiles()
    reports = Reports(files)
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    thread = threading.Thread(target=start, args=(context, writer))  # ends before the process that it starts
    thread.start()
    thread.join()
    family = [reader.recv() for _ in range(2)]
    if not os.fork():  # holds every pipe and open file of its parent
        time.sleep(600)
    print(*family, flush=True)
    if "replaced" in sys.argv:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["killed", "replaced"])
def test_processes_of_an_engine_end_with_their_caller(tmp_path: Path, how: str) -> None:
    """Within seconds, whichever thread started them, and though a fork of the caller lives. A caller that replaces
    itself by `exec` keeps its process id."""
    script = tmp_path / "script.py"
    script.write_text(FAMILY)
    parent = subprocess.Popen(
        [sys.executable, str(script), how], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    engine: list[psutil.Process] = []
    try:
        assert parent.stdout is not None
        engine = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(engine) == 2
        if how == "killed":
            assert all(process.is_running() for process in engine)
            parent.kill()
        wait_until(lambda: all(has_ended(process) for process in engine), "they have ended")
        if how == "killed":
            assert parent.wait(60) == -signal.SIGKILL  # its files, which they watch, are closed before it has ended
        else:
            assert parent.poll() is None
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
        for process in engine:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


FORKING = """
import multiprocessing, os, sys, time, weakref
from twinkle_serve.engines.vllm.processes import leave_to_parent

class Manager:
    pass

def shutdown(started):  # as vLLM's
    for process in started:
        if process.is_alive():
            process.terminate()

shutdown.__module__ = "vllm.v1.utils"

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    manager = Manager()
    weakref.finalize(manager, shutdown, [process])
    leave_to_parent()
    if (child := os.fork()) == 0:
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), process.is_alive())
"""


def test_fork_of_the_caller_exits_without_a_word(tmp_path: Path) -> None:
    """What vLLM and multiprocessing do at exit is for the caller alone, which still does it."""
    script = tmp_path / "script.py"
    script.write_text(FORKING)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout, result.stderr, result.returncode) == ("0 True\n", "", 0)


@pytest.mark.parametrize(
    ("environment", "numa_bind", "forks"),
    [
        ({}, False, True),
        ({}, True, False),  # vLLM binds memory by spawning
        ({"LD_PRELOAD": "/usr/lib/libiomp5.so"}, False, False),  # its threads would have the core's cores
        ({METHOD: "spawn"}, False, False),
        ({METHOD: "fork"}, False, True),
    ],
)
def test_workers_are_forked_unless_the_user_or_the_machine_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], numa_bind: bool, forks: bool
) -> None:
    for name in (METHOD, MAY_FORK, "LD_PRELOAD"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):  # a process may have two engines
        prefer_spawn()
    assert os.environ[METHOD] == environment.get(METHOD, "spawn")
    config: Any = types.SimpleNamespace(parallel_config=types.SimpleNamespace(numa_bind=numa_bind))
    fork_workers(config)
    assert os.environ[METHOD] == ("fork" if forks else "spawn")


@pytest.mark.parametrize(
    ("executor", "workers", "device", "preload", "expected"),
    [
        ("mp", 1, "cpu", "", IN_CORE),
        ("mp", 1, "cuda", "", "uni"),
        ("mp", 2, "cpu", "", "mp"),
        ("mp", 2, "cuda", "", "mp"),
        ("ray", 1, "cuda", "", "ray"),
        ("mp", 1, "cpu", "/usr/lib/libiomp5.so", "mp"),  # it has to know its cores before it is loaded
    ],
)
def test_worker_that_is_alone_runs_in_the_core(
    monkeypatch: pytest.MonkeyPatch, executor: str, workers: int, device: str, preload: str, expected: str
) -> None:
    monkeypatch.setenv("LD_PRELOAD", preload)
    assert executor_backend(executor, workers, device) == expected


async def test_engine_in_a_script_that_a_child_imports_says_what_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """As multiprocessing does for a script without a main guard."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    engine = build_engine("vllm", "imported", str(hub.DEMO), {})
    with pytest.raises(EngineStartError, match='below `if __name__ == "__main__":`'):
        await engine.start()


async def test_engine_in_a_script_without_a_file_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as `python < script.py`, or a script that was deleted."""
    main = types.ModuleType("__main__")
    main.__file__ = "<stdin>"
    monkeypatch.setitem(sys.modules, "__main__", main)
    engine = build_engine("vllm", "piped", str(hub.DEMO), {})
    with pytest.raises(EngineStartError, match="there is no file <stdin>"):
        await engine.start()


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv(REPORTS, raising=False)
    files = EngineFiles()
    yield Reports(files)
    files.close()
    logger = logging.getLogger("vllm")
    logger.handlers = [handler for handler in logger.handlers if "Report" not in type(handler).__name__]


def test_error_without_text_is_reported_with_its_type_and_place(reports: Reports) -> None:
    """vLLM passes on `str(error)` alone, which is empty for an assertion."""
    report_errors("worker")
    assert reports.take() == ""
    rows = 3
    try:
        assert rows == 4
    except AssertionError as error:
        assert describe(error).startswith("AssertionError")
        logging.getLogger("vllm.v1.executor").exception("WorkerProc hit an exception.")
    report = reports.take()
    assert report.startswith("AssertionError") and "test_vllm_processes.py" in report and "assert rows == 4" in report
    assert reports.take() == "", "an error is told once"


def test_workers_error_comes_before_its_consequences(reports: Reports) -> None:
    """The core's own error is that a worker failed; and a dead engine tells its cause every time."""
    for source, text in (("worker", "no memory"), ("core", "Worker failed with error ''")):
        report_errors(source)
        try:
            raise RuntimeError(text)
        except RuntimeError:
            logging.getLogger("vllm").exception("failed")
    assert reports.cause_of_death().startswith("RuntimeError: no memory")
    assert reports.cause_of_death().startswith("RuntimeError: no memory")


def test_report_that_cannot_be_written_is_no_error(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is another node's, or the engine has stopped: logging goes on."""
    monkeypatch.setenv(REPORTS, "/nowhere/reports")
    report_errors("core")
    try:
        raise RuntimeError("late")
    except RuntimeError:
        logging.getLogger("vllm").exception("failed")
