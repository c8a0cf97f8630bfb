"""Ray clusters of several nodes on this machine, by the commands of docs/how-to.md."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.docs import ROOT, blocks_of
from tests.support.eventually import wait_until
from tests.support.ray_cluster import free_port
from tests.support.service_logs import cluster_directory

HOW_TO = ROOT / "docs" / "how-to.md"
START_S = 120.0


@dataclass(frozen=True)
class Node:
    """`ray start`, and everything under it."""

    process: subprocess.Popen[bytes]

    def holds(self, process: psutil.Process) -> bool:
        """Whether a process was started by this node."""
        return self.process.pid in {parent.pid for parent in process.parents()}


@dataclass(frozen=True)
class Nodes:
    """A cluster of a head and another node."""

    head: Node
    other: Node
    environment: dict[str, str]
    """For `scripts/serve` and callers, as the how-to sets it."""

    @property
    def address(self) -> str:
        return self.environment["RAY_ADDRESS"]


@dataclass(frozen=True)
class Command:
    """A command line of the how-to."""

    variables: dict[str, str]
    """Set before it, for it alone."""
    words: list[str]


def documented_commands(head: str = "head:6379") -> list[Command]:
    """The commands of the section "Several nodes", with this address of the head."""
    text = HOW_TO.read_text(encoding="utf-8")
    line = text[: text.index("## Several nodes\n")].count("\n")
    block = next(block for block in blocks_of(HOW_TO) if block.line > line)
    code = block.code.replace("head:6379", head).replace("6379", head.rpartition(":")[2])
    commands = []
    for words in (shlex.split(command, comments=True) for command in code.splitlines()):
        variables = dict(word.split("=", 1) for word in itertools.takewhile(lambda word: "=" in word, words))
        commands.append(Command(variables, words[len(variables) :]))
    return commands


@contextlib.contextmanager
def two_nodes(cpus: int) -> Iterator[Nodes]:
    """Runs the documented commands of both nodes, each with a directory of its own and `cpus` CPUs, on free ports."""
    token, head, other, launcher = documented_commands(f"127.0.0.1:{free_port()}")
    subprocess.run(token.words, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert head.words[:3] == ["ray", "start", "--head"] and other.words[:3] == ["ray", "start", "--address"]
    assert launcher.words == ["scripts/serve", "config.yaml"]
    ports = ["--dashboard-port", str(free_port()), "--ray-client-server-port", str(free_port())]
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    with contextlib.ExitStack() as stack:

        def started(command: Command, *more: str) -> Node:
            words = [*command.words, *more, "--num-cpus", str(cpus)]
            return stack.enter_context(_node(words, inherited | command.variables))

        yield Nodes(started(head, *ports), started(other), inherited | launcher.variables)


@contextlib.contextmanager
def _node(command: list[str], environment: dict[str, str]) -> Iterator[Node]:
    with cluster_directory() as directory:
        log = Path(directory) / "start"
        with log.open("wb") as output:
            # With --block, the node ends with the command.
            process = subprocess.Popen(
                [*command, "--temp-dir", directory, "--block"], env=environment, stdout=output, stderr=output
            )
        try:
            wait_until(
                lambda: process.poll() is not None or "Ray runtime started" in log.read_text(),
                f"{shlex.join(command)} has started",
                START_S,
            )
            assert process.poll() is None, log.read_text()[-4000:]
            yield Node(process)
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(60)
            _, alive = psutil.wait_procs(family, timeout=60)
            assert not alive, f"left behind: {alive}"
