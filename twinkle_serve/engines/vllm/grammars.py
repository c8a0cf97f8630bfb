"""Checks of structured outputs before vLLM sees them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cachetools import LRUCache

from twinkle_serve.data_format.structured_outputs import NAME, Kind
from twinkle_serve.engines.vllm.grammar_check import GrammarSettings
from twinkle_serve.engines.vllm.grammar_process import WALL_FACTOR
from twinkle_serve.errors import EngineDeadError, EngineError, SamplingParamsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Spec: TypeAlias = str | dict[str, Any] | Sequence[str] | bool
Result: TypeAlias = dict[str, str]
"""Problem and detail; empty for a valid specification."""

GRAMMAR_S = 10
"""CPU time in which a specification must be validated, compiled and tried. Strings of limited length take xgrammar
6 to 9 s with a vocabulary of 131,000 and a slow core."""
MEMORY_BYTES = 2**30
"""Memory that this may take."""
CACHED_SPECS = 512
START_S = 180.0
"""Limit for the start of the helper, which imports vLLM: 10 s of CPU time."""
ATTEMPTS = 2
"""A check whose helper is killed is repeated once."""

SIMPLER: dict[Kind, str] = {
    "json": "Simplify it: fewer nested alternatives, shorter enums, no limits on the length of strings.",
    "regex": "Simplify it: no nested repetition, fewer alternatives, narrower character classes than \\w.",
    "choice": "List fewer choices.",
    "grammar": "Simplify it: no nested repetition, fewer rules, and none that match a text in several ways.",
    "json_object": "Give a schema instead.",
    "structural_tag": "Simplify its schemas.",
}

STOPPED = "the engine is stopped."

BOOT = "from twinkle_serve.engines.vllm.grammar_process import main; main()"


class GrammarChecks:
    """Checks structured outputs in a helper process, because vLLM validates them on the event loop, without a limit.

    Guarantees:
        - The event loop is never blocked by a specification, and a check ends in bounded time.
        - A check that takes too much, or crashes, affects no other check: each has a process and limits of its own.
        - Equal specifications are checked once, also by concurrent calls.
        - The helper starts with the first check, and is replaced if it is killed. It ends with `close`, and with the
          process that owns it.
    """

    def __init__(
        self, config: VllmConfig, owner: Path, *, limit_s: float = GRAMMAR_S, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        """
        Args:
            owner: file that the owning process holds, see `end_with_holder`.
            limit_s: CPU time of a check.
            memory_bytes: memory of a check.
        """
        self._settings = GrammarSettings.of(config)
        self._owner = owner
        self._limit_s, self._memory_bytes = limit_s, memory_bytes
        self._results: LRUCache[bytes, Result] = LRUCache(CACHED_SPECS)
        self._running: dict[bytes, asyncio.Task[Result]] = {}
        self._helper: asyncio.Task[_Helper] | None = None
        self._closed = False

    async def check(self, kind: Kind, spec: Spec) -> None:
        """Checks that vLLM takes a specification, and compiles it within the limits.

        Raises:
            SamplingParamsError: it is invalid or takes too much.
            EngineError: the helper does not start, or was killed repeatedly.
        """
        request = json.dumps([kind, spec])
        key = hashlib.sha256(request.encode()).digest()
        result = self._results.get(key)
        if result is None:
            if key not in self._running:
                self._running[key] = task = asyncio.create_task(self._run(key, request))
                task.add_done_callback(_note_exception)
            result = await asyncio.shield(self._running[key])  # others may wait for it, and the next call
        if result:
            raise SamplingParamsError(self._message(kind, **result))

    async def _run(self, key: bytes, request: str) -> Result:
        try:
            result = await self._ask(request)
            if result.get("problem") != "late":  # another time there may be a core for it
                self._results[key] = result
            return result
        finally:
            del self._running[key]

    async def _ask(self, request: str) -> Result:
        for _ in range(ATTEMPTS):
            helper = await self._started()
            with contextlib.suppress(_HelperDiedError):
                return await helper.ask(request)
        raise EngineError("the process that checks structured outputs was killed repeatedly. Is memory short?")

    async def _started(self) -> _Helper:
        """The helper, which it starts if there is none that lives."""
        if self._closed:
            raise EngineDeadError(STOPPED)
        task = self._helper
        if task is None or (task.done() and (task.exception() is not None or task.result().died)):
            arguments = [str(self._owner), json.dumps(asdict(self._settings))]
            arguments.append(json.dumps([self._limit_s, self._memory_bytes]))
            task = self._helper = asyncio.create_task(_Helper.start(arguments))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise EngineDeadError(STOPPED) from None
            raise

    async def close(self) -> None:
        """Ends the helper; running checks fail. Idempotent."""
        self._closed = True
        if self._helper is not None:
            self._helper.cancel()  # if it is starting
            [helper] = await asyncio.gather(self._helper, return_exceptions=True)
            if isinstance(helper, _Helper):
                await helper.end()

    def _message(self, kind: Kind, problem: str, detail: str = "") -> str:
        backend = f"vLLM's grammar backend {self._settings.backend}"
        simpler = SIMPLER[kind]
        if self._settings.backend == "xgrammar" and (problem in ("tokens", "slow", "memory") or "not supp" in detail):
            simpler += " Or set engine_args.structured_outputs_config: {backend: guidance}."
        wall_s = WALL_FACTOR * self._limit_s
        texts = {
            "invalid": f"is refused by {backend}: {detail}. {simpler if 'not supp' in detail else 'Correct it.'}",
            "empty": "matches no text. Correct it.",
            "stuck": f"fails in {backend}: {detail}. Correct or simplify it.",
            "tokens": f"takes {detail} of CPU time for each token, which all requests would wait for. {simpler}",
            "slow": f"takes more than {self._limit_s:g} s of CPU time to be compiled. {simpler}",
            "late": f"was not compiled in {wall_s:g} s. Are all cores busy? Try again, or simplify it.",
            "memory": f"takes more than {self._memory_bytes // 2**20} MiB to be compiled. {simpler}",
            "crash": f"crashes {backend} ({detail}). {simpler}",
        }
        return f"{NAME}.{kind} {texts[problem]}"


def _note_exception(task: asyncio.Task[Result]) -> None:
    """Keeps asyncio from logging the failure of a check whose callers were cancelled."""
    if not task.cancelled():
        task.exception()


class _HelperDiedError(Exception):
    """The helper ended before it replied."""


class _Helper:
    """A started helper process and the connection to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader, self._writer = reader, writer
        self._ids = itertools.count()
        self._replies: dict[int, asyncio.Future[Result]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self.died = False

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> _Helper:
        """
        Raises:
            EngineError: it does not start.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = _spawn(theirs.fileno(), arguments)
        reader, writer = await asyncio.open_connection(sock=ours)
        helper = cls(process, reader, writer)
        try:
            async with asyncio.timeout(START_S):
                first = json.loads(await reader.readline() or b"{}")
            if "ready" not in first:
                raise EngineError(first.get("failed") or "it was killed")
        except BaseException as error:
            await helper.end()
            if isinstance(error, (EngineError, TimeoutError)):
                reason = str(error) or f"not ready within {START_S:g} s"
                raise EngineError(f"the process that checks structured outputs does not start: {reason}.") from error
            raise
        helper._reading = asyncio.create_task(helper._read())
        return helper

    async def ask(self, request: str) -> Result:
        """Sends a request, kind and specification as JSON, and waits for its reply."""
        if self.died:
            raise _HelperDiedError
        number = next(self._ids)
        reply: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        self._writer.write(f"[{number}, {request}]\n".encode())
        return await reply

    async def _read(self) -> None:
        with contextlib.suppress(OSError):
            while line := await self._reader.readline():
                result = json.loads(line)
                if not (reply := self._replies.pop(result.pop("id"))).done():
                    reply.set_result(result)
        await self.end()

    async def end(self) -> None:
        """Kills the helper and its checks, and waits for its end. Idempotent."""
        self.died = True
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        # Before the process is reaped, so that its id is still its own. Its checks may outlive it, in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            await asyncio.to_thread(self._process.wait)
        except RuntimeError:  # the interpreter is exiting and starts no more threads
            self._process.wait()
        self._writer.close()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(_HelperDiedError())
        self._replies.clear()


def _spawn(descriptor: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts the helper in a process group of its own, with this process's import path."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_REGEX_COMPILATION_TIMEOUT_S": "0",  # vLLM's own limit leaves a thread that goes on
    }
    return subprocess.Popen(
        [sys.executable, "-c", BOOT, str(descriptor), *arguments],
        env=environment,
        pass_fds=[descriptor],
        process_group=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
