"""The processes that vLLM starts: how they begin, end and report their errors.

Both the process with the engine and vLLM's own use this module; it imports vLLM where it needs it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any

from twinkle_serve.engines.vllm.tmpfs import OWNER, MemoryDirectory
from twinkle_serve.errors import EngineStartError
from twinkle_serve.parent import end_with_holder, end_with_parent

REPORTS = "TWINKLE_SERVE_VLLM_REPORTS"
"""Environment variable with the path of the file in which vLLM's processes report their errors."""

EXTENSION = "twinkle_serve.engines.vllm.worker.WorkerExtension"
"""`worker_extension_cls` of our engines."""

MAIN_GUARD = (
    "vLLM's process imports the script again, and the script makes a sampler when it is imported. Put the script's "
    'statements into a function, and call it below `if __name__ == "__main__":`.'
)

_vllms_own: Any = None
"""EngineCoreProc.run_engine_core, once `use_own_entry` has replaced it."""


def use_own_entry() -> None:
    """Makes vLLM start the processes of our engines by `run_engine_core`, and leaves them to this process alone.
    Idempotent."""
    global _vllms_own
    from vllm.v1.engine.core import EngineCoreProc

    leave_to_parent()
    if EngineCoreProc.run_engine_core is not run_engine_core:
        _vllms_own = EngineCoreProc.run_engine_core
        EngineCoreProc.run_engine_core = staticmethod(run_engine_core)


@functools.cache
def leave_to_parent() -> None:
    """Makes forks of this process leave vLLM's processes to it. Idempotent.

    A fork would end them as it exits, by the finalizers of vLLM and of multiprocessing: these raise there, and their
    tracebacks are printed.
    """
    os.register_at_fork(after_in_child=_forget_processes)


def _forget_processes() -> None:
    for finalizer, info in list(weakref.finalize._registry.items()):  # type: ignore[attr-defined]
        if str(getattr(info.func, "__module__", "")).partition(".")[0] == "vllm":
            finalizer.detach()
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]  # as in multiprocessing's own forks


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """Runs vLLM's engine core in a process group of its own, so that a terminal's Ctrl-C, which is for the caller, does
    not reach it, and ends it with its caller. Engines that are not ours run as vLLM starts them.

    Not in a session of its own: Linux shares cores between sessions, and an engine on CPU would starve its caller.
    """
    from vllm.v1.engine.core import EngineCoreProc

    own = _vllms_own or EngineCoreProc.run_engine_core  # a forked process has inherited our replacement
    if kwargs["vllm_config"].parallel_config.worker_extension_cls == EXTENSION:
        with contextlib.suppress(PermissionError):  # it leads one already
            os.setpgid(0, 0)
        end_with_owner()
        report_errors()
    own(*args, **kwargs)


def end_with_owner() -> None:
    """Ends this process, the core, with the one that has the engine, and names it to `Reports.kill_core`. Ends it at
    once where the engine was stopped before it began.

    Unlike a parent's process id, the owner's file tells, too, that the owner has replaced itself by `exec`.
    """
    reports = Path(os.environ[REPORTS])
    try:
        end_with_holder(reports.with_name(OWNER))
        _pid_file(reports).write_text(str(os.getpid()))
    except OSError:
        sys.exit(1)


def end_with_starter() -> None:
    """Ends this process, a worker, with the core that started it by `multiprocessing`; Ray ends its own workers."""
    starter = multiprocessing.parent_process()
    if starter is not None and starter.pid is not None:
        end_with_parent(starter.pid)


def refuse_import_of_main() -> None:
    """Refuses to start an engine while this process, which was spawned, imports the main script of its parent, and in a
    script that no other process can import.

    Raises:
        EngineStartError
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        _report("main", MAIN_GUARD)
        raise EngineStartError(MAIN_GUARD)
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is not None and getattr(main, "__spec__", None) is None and not Path(path).exists():
        raise EngineStartError(f"vLLM's process imports the script again, and there is no file {path}. Save it in one.")


class Reports:
    """Errors that vLLM's processes have logged. vLLM passes on their text alone, which may be empty, or nothing."""

    def __init__(self, files: MemoryDirectory) -> None:
        self._path = files.write("reports", "")
        os.environ[REPORTS] = str(self._path)
        self._cause_of_death = ""

    def take(self, *, starting: bool = False) -> str:
        """Returns the last error since the last call, of a worker if one has failed; "" for none.

        Args:
            starting: include refused imports of the main script.
        """
        try:
            lines = self._path.read_text().splitlines()
            os.truncate(self._path, 0)
        except OSError:  # the engine is being stopped
            return ""
        texts: dict[str, str] = dict(json.loads(line) for line in lines)
        sources = ("main",) * starting + ("worker", "core")
        return next((texts[source] for source in sources if source in texts), "")

    def kill_core(self) -> None:
        """Kills an engine that is starting. One whose process has yet to begin ends as it does."""
        with contextlib.suppress(OSError, ValueError):  # it has not begun, or has ended
            os.killpg(int(_pid_file(self._path).read_text()), signal.SIGKILL)

    def cause_of_death(self) -> str:
        """As `take`, for an engine that is dead: the same error whenever it is asked."""
        self._cause_of_death = self._cause_of_death or self.take()
        return self._cause_of_death


class _ReportHandler(logging.Handler):
    """Writes the exceptions that this process logs to the file of `Reports`."""

    def __init__(self, source: str) -> None:
        super().__init__(logging.ERROR)
        self._source = source

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and (error := record.exc_info[1]) is not None:
            _report(self._source, describe(error))


def report_errors(source: str = "core") -> None:
    """Makes this process report the exceptions that vLLM logs in it.

    Args:
        source: core or worker.
    """
    logger = logging.getLogger("vllm")
    if not any(isinstance(handler, _ReportHandler) for handler in logger.handlers):
        logger.addHandler(_ReportHandler(source))


def describe(error: BaseException) -> str:
    """Type, text and place of an error, in one line."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{place}"


def _pid_file(reports: Path) -> Path:
    return reports.with_suffix(".pid")


def _report(source: str, text: str) -> None:
    if path := os.environ.get(REPORTS):
        with contextlib.suppress(OSError), Path(path).open("a") as file:  # another node's, or the engine has stopped
            file.write(json.dumps([source, text]) + "\n")
