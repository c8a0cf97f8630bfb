"""scripts/serve as a user runs it, in processes of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tests.support.service_logs import cluster_directory

ROOT = Path(__file__).parents[2]
READY_S = 500


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def config_with(path: Path, **args: object) -> Path:
    """serve_config.yaml with some args of its own, its gateway at `http_options.port`, a port of its own."""
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    port = free_port()
    document["http_options"] = {"port": port}
    document["applications"][1]["args"] = {"listen": f"127.0.0.1:{port}"}
    document["applications"][0]["args"].update(args)
    path.write_text(yaml.safe_dump(document))
    return path


@contextlib.contextmanager
def own_environment(**variables: str) -> Iterator[dict[str, str]]:
    """An environment in which Ray finds no other cluster, and none finds the one that is started in it."""
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with cluster_directory() as directory:
        yield {**inherited, "RAY_TMPDIR": directory, **variables}


@dataclass
class Service:
    process: subprocess.Popen[str]
    environment: dict[str, str]
    """Environment for callers, with RAY_ADDRESS: without it, Ray joins any cluster on the machine."""
    dashboard: str
    config: Path

    @property
    def output(self) -> str:
        """What the launcher has printed."""
        return self.config.with_name("log").read_text()

    def run(self, *command: str, timeout_s: float = 300, **environment: str | None) -> subprocess.CompletedProcess[str]:
        """Runs Python; a variable that is None is not set."""
        variables = {**self.environment, **environment}
        return subprocess.run(
            [sys.executable, *command],
            env={key: value for key, value in variables.items() if value is not None},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


def start(config: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as output:
        return subprocess.Popen(
            ["scripts/serve", str(config)], cwd=ROOT, env=environment, stdout=output, stderr=output, text=True
        )


def ended(process: subprocess.Popen[str], timeout_s: float) -> int:
    """Its exit code; nothing that it started may outlive it."""
    family = psutil.Process(process.pid).children(recursive=True)
    code = process.wait(timeout_s)
    _, alive = psutil.wait_procs(family, timeout=60)
    for survivor in alive:
        survivor.kill()
    assert not alive, f"left behind: {alive}"
    return code


def ready(process: subprocess.Popen[str], log: Path) -> str:
    """Waits until it says that it is ready. Returns the dashboard's address."""
    follow = subprocess.run(
        ["timeout", str(READY_S), "sh", "-c", f"tail -n +1 -f --pid={process.pid} {log} | grep -m1 'dashboard  http'"],
        capture_output=True,
        text=True,
    )
    found = re.search(r"dashboard  (http://\S+?)/#", follow.stdout)
    assert found, f"not ready within {READY_S} s:\n{log.read_text()[-4000:]}"
    return found[1]


def gcs_address(process: subprocess.Popen[str]) -> str:
    """The address of the cluster that scripts/serve has started."""
    commands = [" ".join(child.cmdline()) for child in psutil.Process(process.pid).children(recursive=True)]
    found: set[str] = {address for command in commands for address in re.findall(r"--gcs-address=(\S+)", command)}
    assert len(found) == 1, found
    return found.pop()


@contextlib.contextmanager
def serving(config: Path, environment: dict[str, str]) -> Iterator[Service]:
    """scripts/serve of a config, ready. Unless a test has stopped it, it must end by Ctrl-C, and leave nothing."""
    log = config.with_name("log")
    process = start(config, environment, log)
    try:
        dashboard = ready(process, log)
        cluster = {"RAY_ADDRESS": gcs_address(process), "RAY_AUTH_MODE": "token"}
        yield Service(process, {**environment, **cluster}, dashboard, config)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            assert ended(process, 60) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
