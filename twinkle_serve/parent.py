"""Ends a process with its parent."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

PERIOD_S = 0.5
"""How often a process checks that its parent lives."""


def end_with_parent(parent: int) -> None:
    """Kills this process, and its process group if it leads one, within a second of its parent's death.

    Args:
        parent: process id; the parent may have ended already.
    """
    threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def hold(path: Path) -> int:
    """Creates a file and locks it for this process. Returns the descriptor to close in the end.

    The lock is free once this process has ended, even by SIGKILL, or has replaced itself by `exec`: its process id is
    the same then. Its forks do not hold the lock. It is free, too, once this process has closed any other descriptor of
    the file, so nothing else here may open it.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    return descriptor


def end_with_holder(path: Path) -> None:
    """Kills this process, and its process group if it leads one, once no process holds a file.

    Raises:
        OSError: there is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    threading.Thread(target=_wait_for_lock, args=(descriptor,), name="holder-watch", daemon=True).start()


def _watch(parent: int) -> None:
    # Not PR_SET_PDEATHSIG: it follows the thread that started this process, and that thread may end before.
    while os.getppid() == parent:
        time.sleep(PERIOD_S)
    _end()


def _wait_for_lock(descriptor: int) -> None:
    fcntl.lockf(descriptor, fcntl.LOCK_SH)
    _end()


def _end() -> None:
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
