"""Errors that vLLM's processes report to the process with the engine.

All of them use this module, so it does not import vLLM.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import traceback
from pathlib import Path

from twinkle_serve.engines.vllm.tmpfs import EngineFiles

REPORTS = "TWINKLE_SERVE_VLLM_REPORTS"
"""Environment variable with the path of the file in which vLLM's processes report their errors."""


class Reports:
    """Errors that vLLM's processes have logged. vLLM passes on their text alone, which may be empty, or nothing."""

    def __init__(self, files: EngineFiles) -> None:
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
            os.killpg(int(pid_file(self._path).read_text()), signal.SIGKILL)

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
            report(self._source, describe(error))


def report_errors(source: str) -> None:
    """Makes this process report the exceptions that vLLM logs in it.

    Args:
        source: core or worker.
    """
    logger = logging.getLogger("vllm")
    for handler in list(logger.handlers):
        if isinstance(handler, _ReportHandler):  # a forked worker has the core's
            logger.removeHandler(handler)
    logger.addHandler(_ReportHandler(source))


def describe(error: BaseException) -> str:
    """Type, text and place of an error, in one line."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{place}"


def pid_file(reports: Path) -> Path:
    """File in which the core writes its process id, beside that of its reports."""
    return reports.with_suffix(".pid")


def report(source: str, text: str) -> None:
    """Reports an error of this process.

    Args:
        source: main, core or worker.
    """
    if path := os.environ.get(REPORTS):
        with contextlib.suppress(OSError), Path(path).open("a") as file:  # another node's, or the engine has stopped
            file.write(json.dumps([source, text]) + "\n")
