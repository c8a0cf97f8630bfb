"""Processes of a service that a test, or the chaos run, has started."""

from __future__ import annotations

import contextlib

import psutil


def with_title(title: str) -> list[psutil.Process]:
    """Descendants whose titles contain this text."""
    return [process for process in psutil.Process().children(recursive=True) if title in _command(process)]


def replica_process(app: str, deployment: str) -> psutil.Process:
    """The process of a deployment's only replica."""
    found = with_title(f"ServeReplica:{app}:{deployment}")
    assert len(found) == 1, found
    return found[0]


def core_processes(replica: psutil.Process) -> list[psutil.Process]:
    """vLLM's own process under an engine's, or none while there is none.

    By its title, or as a process that `multiprocessing` has spawned and that has none: setproctitle does nothing where
    the first variable of the environment was changed, and which is the first differs from one engine to the next.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in replica.children() if _is_core(child)]
    return []


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended; also as a zombie, which its parent, or init, has yet to wait for."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _is_core(process: psutil.Process) -> bool:
    command = _command(process)
    return command.startswith("VLLM::EngineCor") or "--multiprocessing-fork" in command


def _command(process: psutil.Process) -> str:
    """Command line of a process; empty if it has ended or is a zombie."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
