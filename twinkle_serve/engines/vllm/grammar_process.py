"""The helper process of GrammarChecks: loads vLLM's grammar code once, and runs each check in a fork of itself.

A fork takes 20 ms, shares the loaded modules, and can be killed without harm to other checks. Requests and replies are
lines of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import resource
import selectors
import signal
import socket
import sys
import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinkle_serve.errors import one_line
from twinkle_serve.parent import end_with_holder

AT_ONCE = 2
"""Checks that run at once; others wait, and their time starts later."""
WALL_FACTOR = 4
"""Limit of a check's wall time, as a multiple of its CPU time: it may wait for a core."""
RECEIVE_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a check."""

    cpu_s: float
    """CPU time, rounded up to whole seconds: validity must not depend on the machine's load."""
    memory_bytes: int
    """Memory beyond that of the helper."""


def main() -> None:
    """Runs the helper. Arguments: the descriptor of its socket, the owner's file, the settings, and the limits."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    end_with_holder(Path(sys.argv[2]))
    warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads: that one only waits for the owner
    gc.disable()
    try:
        from twinkle_serve.engines.vllm.grammar_check import GrammarCheck, GrammarSettings, Refused

        check = GrammarCheck(GrammarSettings(**json.loads(sys.argv[3])))
        with contextlib.suppress(Refused):
            check("json_object", True)  # imports what checks need
    except Exception as error:
        _send(connection, {"failed": one_line(error)})
        return
    gc.freeze()
    _send(connection, {"ready": True})
    Server(connection, check, Limits(*json.loads(sys.argv[4]))).run()


@dataclass(slots=True)
class _Fork:
    """A running check."""

    id: int
    pid: int
    reader: int
    ends_at: float
    late: bool = False
    output: bytes = field(default=b"")


class Server:
    """Takes requests from a socket and runs them, some at once, in forks."""

    def __init__(self, connection: socket.socket, check: Any, limits: Limits) -> None:
        self._connection = connection
        self._check = check
        self._limits = limits
        self._received = b""
        self._waiting: deque[Any] = deque()
        """Ids, each with kind and specification."""
        self._forks: dict[int, _Fork] = {}
        """By the descriptor of its result."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)

    def run(self) -> None:
        """Serves until the other side closes the connection, and ends the checks that run then."""
        try:
            self._serve()
        finally:
            for fork in self._forks.values():
                os.kill(fork.pid, signal.SIGKILL)

    def _serve(self) -> None:
        while True:
            while self._waiting and len(self._forks) < AT_ONCE:
                self._start(*self._waiting.popleft())
            now = time.monotonic()
            next_end = min((fork.ends_at for fork in self._forks.values() if not fork.late), default=None)
            for key, _ in self._selector.select(None if next_end is None else max(0.0, next_end - now)):
                if key.fileobj is not self._connection:
                    self._read(self._forks[key.fd])
                elif not self._receive():
                    return
            for fork in self._forks.values():
                if not fork.late and time.monotonic() >= fork.ends_at:
                    fork.late = True
                    os.kill(fork.pid, signal.SIGKILL)

    def _receive(self) -> bool:
        """Takes requests. Returns false once the connection is closed."""
        data = self._connection.recv(RECEIVE_BYTES)
        *lines, self._received = (self._received + data).split(b"\n")
        self._waiting.extend(map(json.loads, lines))
        return bool(data)

    def _start(self, number: int, request: tuple[str, Any]) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self._connection.close()
                os.close(reader)
                _limit(self._limits)
                os.write(writer, json.dumps(_result(self._check, *request)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        ends_at = time.monotonic() + WALL_FACTOR * self._limits.cpu_s
        self._forks[reader] = _Fork(id=number, pid=pid, reader=reader, ends_at=ends_at)
        self._selector.register(reader, selectors.EVENT_READ)

    def _read(self, fork: _Fork) -> None:
        """Reads a fork's result, and replies with it at its end."""
        if data := os.read(fork.reader, RECEIVE_BYTES):
            fork.output += data
            return
        self._selector.unregister(fork.reader)
        os.close(fork.reader)
        del self._forks[fork.reader]
        code = os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])
        result = json.loads(fork.output) if fork.output else _result_of_exit(code, late=fork.late)
        _send(self._connection, {"id": fork.id, **result})


def _limit(limits: Limits) -> None:
    """Limits this process, a fork, to the CPU time and memory of a check."""
    cpu_s = math.ceil(limits.cpu_s)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = Path("/proc/self/status").read_text()
    used_bytes = 1024 * int(status.split("VmData:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + limits.memory_bytes,) * 2)
    with contextlib.suppress(OSError):  # the first to go where memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")


def _result(check: Any, kind: str, spec: object) -> dict[str, str]:
    from twinkle_serve.engines.vllm.grammar_check import Refused

    try:
        check(kind, spec)
    except Refused as refused:
        return {"problem": refused.problem, "detail": refused.detail}
    except MemoryError:
        return {"problem": "memory"}
    return {}


def _result_of_exit(code: int, *, late: bool) -> dict[str, str]:
    """The result of a check whose process ended without one."""
    if late:
        return {"problem": "late"}
    if code == -signal.SIGXCPU:
        return {"problem": "slow"}
    if code in (-signal.SIGABRT, -signal.SIGKILL, 0):  # native code aborts where it gets no memory; Python may exit
        return {"problem": "memory"}
    return {"problem": "crash", "detail": f"signal {-code}" if code < 0 else f"exit code {code}"}


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the other side is gone, and with it soon this process
        connection.sendall(json.dumps(message).encode() + b"\n")
