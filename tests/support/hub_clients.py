"""Processes that resolve models by the libraries' own download code, against a hub on loopback."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from tests.support.hub_server import HubServer
from twinkle_serve import hub

ANSWER_S = 60.0
"""How long a test waits for one call of resolve."""
WEIGHTS = Random(0).randbytes(3 * 2**20)
FILES = {"config.json": b'{"model_type": "main"}', "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}


@dataclass(frozen=True)
class Outcome:
    """Outcome of one call of resolve."""

    path: Path | None
    error: str
    """Name of the exception's class; empty if there was none."""
    message: str
    warnings: list[str]
    seconds: float


class Client:
    """A process that resolves models, with its own environment, which the libraries read on import.

    All are forked from one process that has imported torch, which ModelScope's library imports: that takes seconds.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", __name__])
        self._here, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, environment), daemon=True)
        self.process.start()
        there.close()

    def ask(self, model_id: str, **arguments: Any) -> None:
        self._here.send((model_id, arguments))

    def answer(self) -> Outcome:
        assert self._here.poll(ANSWER_S), f"resolve took longer than {ANSWER_S} s"
        outcome: Outcome = self._here.recv()
        return outcome

    def resolve(self, model_id: str, **arguments: Any) -> Outcome:
        self.ask(model_id, **arguments)
        return self.answer()

    def whole(self, model_id: str, **arguments: Any) -> Path:
        """Directory returned by a call that must succeed."""
        outcome = self.resolve(model_id, **arguments)
        assert outcome.path is not None, f"{outcome.error}: {outcome.message}"
        return outcome.path

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self._here.close()


def _serve(calls: Connection, environment: dict[str, str]) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "MODELSCOPE_")) or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(environment)
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    hub.logger.addHandler(handler)
    while True:
        try:
            model_id, arguments = calls.recv()
        except EOFError:
            return
        warnings.clear()
        started = time.monotonic()
        path, error, message = None, "", ""
        try:
            path = hub.resolve(model_id, **arguments)
        except Exception as caught:
            error, message = type(caught).__name__, str(caught)
        calls.send(Outcome(path, error, message, list(warnings), time.monotonic() - started))


@dataclass
class World:
    """A hub, a cache, and clients of one library that share both."""

    scheme: str
    """hf or ms."""
    server: HubServer
    cache: Path
    clients: list[Client] = field(default_factory=list)

    def client(self, endpoint: str | None = None, **environment: str) -> Client:
        made = Client(
            {
                "HF_ENDPOINT": endpoint or self.server.endpoint,
                "HF_HOME": str(self.cache / "hf"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "MODELSCOPE_ENDPOINT": endpoint or self.server.endpoint,
                "MODELSCOPE_CACHE": str(self.cache / "ms"),
                "MODELSCOPE_HOME": str(self.cache / "ms-home"),
                "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false",
                **environment,
            }
        )
        self.clients.append(made)
        return made

    def id(self, name: str) -> str:
        return f"{self.scheme}://org/{name}"

    def serve(self, name: str, revision: str = "main", **changed: bytes | None) -> str:
        """Puts a model on the hub and returns its repository. Keywords replace files, by name without suffix."""
        folder = self.server.root / "org" / name / revision
        folder.mkdir(parents=True)
        for path, body in FILES.items():
            content = changed.get(path.split(".")[0], body)
            if content is not None:
                (folder / path).write_bytes(content)
        return f"org/{name}"


def content(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in FILES if (folder / path).is_file()}
