"""Where the output of Ray, Serve and the engines goes: a file; the terminal is the launcher's."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType


class OutputLog:
    """Sends what this process, and Ray in it, write to stdout and stderr to a new file, until it is closed."""

    def __init__(self) -> None:
        directory = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            prefix=time.strftime("twinkle-serve-%Y%m%d-%H%M%S-"), suffix=".log", dir=directory
        )
        self.path = Path(name)
        self._read_to = 0
        _flush()
        self._saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        # The original stdout and stderr.
        self.stdout, self.stderr = (
            os.fdopen(os.dup(saved), "w", buffering=1, errors="replace") for _, saved in self._saved
        )
        for fd, _ in self._saved:
            os.dup2(descriptor, fd)
        os.close(descriptor)
        for stream in (sys.stdout, sys.stderr):
            if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
                reconfigure(line_buffering=True)

    def __enter__(self) -> OutputLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        _flush()
        for fd, saved in self._saved:
            os.dup2(saved, fd)
            os.close(saved)

    def new_lines(self) -> list[str]:
        """Whole lines that were written since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read_to += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
