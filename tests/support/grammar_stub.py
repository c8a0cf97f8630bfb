"""A helper process of GrammarChecks without vLLM: the specification says what a check does."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from twinkle_serve.engines.vllm.grammar_check import Refused
from twinkle_serve.engines.vllm.grammar_process import Limits, Server
from twinkle_serve.parent import end_with_holder

CHECKS = "TWINKLE_SERVE_TEST_CHECKS"
"""Environment variable with a file to which each check adds a line."""


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    end_with_holder(Path(sys.argv[2]))
    connection.sendall(b'{"ready": true}\n')
    Server(connection, _check, Limits(*json.loads(sys.argv[4]))).run()


def fail() -> None:
    """As `main`, where vLLM cannot be imported."""
    socket.socket(fileno=int(sys.argv[1])).sendall(b'{"failed": "ImportError: no vllm"}\n')


def _check(kind: str, spec: str) -> None:
    with Path(os.environ[CHECKS]).open("a") as file:
        file.write(f"{spec}\n")
    if spec.startswith("invalid"):
        raise Refused("invalid", "no such rule")
    if spec.startswith("slow"):
        while True:
            pass
    if spec.startswith("asleep"):
        time.sleep(600)
    if spec.startswith("memory"):
        bytearray(2**28)
    if spec.startswith("abort"):
        os.abort()
    if spec.startswith("crash"):
        ctypes.string_at(0)
    if spec.startswith("killed helper"):
        os.kill(os.getppid(), signal.SIGKILL)
