"""A real Prometheus that scrapes the cluster of this process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from observability.launcher import DISCOVERY, start_prometheus, stop
from tests.support.ray_cluster import free_port

DOWNLOADED = Path(__file__).parents[2] / "build" / "prometheus"


def program() -> Path:
    """Prometheus on PATH, or that of Debian's package, which is unpacked without an installation. Skips the test where
    there is neither."""
    if found := shutil.which("prometheus"):
        return Path(found)
    path = DOWNLOADED / "usr" / "bin" / "prometheus"
    if not path.is_file():
        DOWNLOADED.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "prometheus"], cwd=DOWNLOADED, check=True, timeout=300)
            (package,) = DOWNLOADED.glob("prometheus_*.deb")
            subprocess.run(["dpkg", "-x", str(package), str(DOWNLOADED)], check=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(
                f"no Prometheus on PATH, and no package of it: {error}. apt-get update; apt-get install prometheus"
            )
    return path


class Prometheus:
    """Queries of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    def values(self, expression: str) -> list[float]:
        """The numbers of an expression of a dashboard or alert, over the last minute."""
        query = expression.replace("$__rate_interval", "1m").replace("$application", ".*")
        assert "$" not in query
        with urllib.request.urlopen(f"{self._url}/api/v1/query?{urllib.parse.urlencode({'query': query})}") as answer:
            result = json.load(answer)["data"]["result"]
        return [value for item in result if not math.isnan(value := float(item["value"][1]))]

    def alert_states(self) -> dict[str, str]:
        """Health of each alert rule, by name: ok, err or unknown."""
        with urllib.request.urlopen(f"{self._url}/api/v1/rules") as answer:
            groups = json.load(answer)["data"]["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}


@contextlib.contextmanager
def prometheus(directory: Path) -> Iterator[Prometheus]:
    """Prometheus as observability/run starts it, over the nodes of this process's cluster."""
    path = program()
    discovery = directory / DISCOVERY  # a cluster without a dashboard writes none
    nodes = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    discovery.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": nodes}]))
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
        process = start_prometheus(directory, discovery, port, None)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        stop([process])
