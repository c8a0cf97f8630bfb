"""Ends a process with its parent."""

from __future__ import annotations

import os
import signal
import threading
import time

PERIOD_S = 0.5
"""How often a process checks that its parent lives."""


def end_with_parent(parent: int) -> None:
    """Kills this process, and its process group if it leads one, within a second of its parent's death.

    Args:
        parent: process id; the parent may have ended already.
    """
    threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    # Not PR_SET_PDEATHSIG: it follows the thread that started this process, and that thread may end before.
    while os.getppid() == parent:
        time.sleep(PERIOD_S)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
