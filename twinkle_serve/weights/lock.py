"""A lock on a state directory, held by the process whose store writes to it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from twinkle_serve.errors import ConfigError
from twinkle_serve.weights.disk import local_path

LOCK = "lock"
RETRY_S = 0.2

_held: set[int] = set()
"""File descriptors of the locks of this process."""


class StateLock:
    """Keeps other stores away from a state directory until it is released or this process ends, however it ends.

    Does not guarantee:
        - Anything for a URL that is not a local directory; see `Disk`.
    """

    def __init__(self, state_dir: str, wait_s: float = 0.0) -> None:
        """
        Args:
            wait_s: how long to wait for a holder that is about to end.

        Raises:
            ConfigError: another store holds it, or the directory cannot be used.
        """
        self._file: int | None = None
        if (directory := local_path(state_dir)) is None:
            return
        deadline = time.monotonic() + wait_s
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = os.open(directory / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise ConfigError(f"state_dir {state_dir!r} cannot be used: {type(error).__name__}: {error}") from error
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(file)
                    raise ConfigError(
                        f"state_dir {state_dir} is in use by {_holder(directory)}, and one service at a time can use "
                        "it. End that one, or name another state_dir."
                    ) from None
                time.sleep(RETRY_S)
        os.truncate(file, 0)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(file, json.dumps(holder).encode(), 0)
        self._file = file
        _held.add(file)

    def release(self) -> None:
        """Frees the directory. Idempotent."""
        if self._file is not None and self._file in _held:
            _held.discard(self._file)
            os.close(self._file)
        self._file = None


def _holder(directory: Path) -> str:
    try:
        return "pid {pid} on {host} since {since}".format(**json.loads((directory / LOCK).read_text()))
    except (OSError, ValueError, KeyError):  # it is about to say
        return "another process"


def _close_in_child() -> None:
    """A lock is shared with forked processes, and would outlive its holder in them."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
