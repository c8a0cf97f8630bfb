"""Runs Prometheus, and Grafana if it is installed, beside the Ray cluster of this machine.

Both listen on this machine alone. Exit codes: 0 after Ctrl-C, 1 when Prometheus ended by itself, 2 when it cannot be
started.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer
import yaml

HERE = Path(__file__).parent
DISCOVERY = "prom_metrics_service_discovery.json"
"""Ray's file with the endpoints of a cluster's nodes."""
START_S = 60.0
STOP_S = 10.0
FAILED, CANNOT_START = 1, 2

NO_PROMETHEUS = """\
Prometheus is not on PATH. Install it, and start this again:
  Debian, Ubuntu   apt-get install prometheus
  elsewhere        the archive of https://prometheus.io/download, with its directory on PATH
Its own service, which Debian's package starts on port 9090, is not needed: this starts another one on --port."""
NO_GRAFANA = """\
Grafana is not installed: no dashboards, only Prometheus. Debian has no package of it; Grafana's own are at
https://grafana.com/grafana/download. Dashboards to import elsewhere: observability/grafana/dashboards."""


class CannotStartError(Exception):
    """Nothing was started; the message says why."""


def main(
    port: Annotated[int, typer.Option("--port", help="Of Prometheus.")] = 9095,
    grafana_port: Annotated[int, typer.Option("--grafana-port", help="Of Grafana.")] = 3000,
    ray_dir: Annotated[
        Path | None, typer.Option("--ray-dir", help="Directory of Ray's sessions; default: RAY_TMPDIR/ray or /tmp/ray.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Where Prometheus keeps its data; default: a directory that is deleted."),
    ] = None,
) -> None:
    """Runs Prometheus and Grafana until Ctrl-C."""
    signal.signal(signal.SIGTERM, _raise_interrupt)
    signal.signal(signal.SIGINT, _raise_interrupt)  # background processes of a shell ignore it
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="twinkle-observability-") as directory:
        try:
            discovery = find_discovery(ray_dir)
            processes.append(start_prometheus(Path(directory), discovery, port, data))
            print(f"Prometheus  http://127.0.0.1:{port}/alerts, scrapes {', '.join(targets(discovery))}")
            if (grafana := start_grafana(Path(directory), port, grafana_port)) is None:
                print(NO_GRAFANA)
            else:
                processes.append(grafana)
                print(f"Grafana     http://127.0.0.1:{grafana_port}/dashboards")
            print("stop        Ctrl-C", flush=True)
            processes[0].wait()
            print("Prometheus has ended.", file=sys.stderr)
            code = FAILED
        except CannotStartError as error:
            print(error, file=sys.stderr)
            code = CANNOT_START
        except KeyboardInterrupt:
            code = 0
        finally:
            stop(processes)
    sys.exit(code)


def find_discovery(ray_dir: Path | None) -> Path:
    """Returns Ray's service discovery file. Raises CannotStartError if there is none."""
    directory = ray_dir or Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    if (path := directory / DISCOVERY).is_file():
        return path.absolute()
    raise CannotStartError(
        f"{path} does not exist: no Ray cluster with a dashboard runs on this machine, or its sessions are in another "
        "directory. Start the service with scripts/serve, or give --ray-dir."
    )


def targets(discovery: Path) -> list[str]:
    """Returns the endpoints that Ray names."""
    return [target for group in json.loads(discovery.read_text()) for target in group["targets"]]


def configuration(discovery: Path) -> str:
    """Returns the configuration of Prometheus for a cluster."""
    document = yaml.safe_load((HERE / "prometheus" / "prometheus.yml").read_text())
    document["rule_files"] = [str(HERE / "prometheus" / "alerts.yml")]
    document["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(discovery)]
    return str(yaml.safe_dump(document, sort_keys=False))


def start_prometheus(directory: Path, discovery: Path, port: int, data: Path | None) -> subprocess.Popen[bytes]:
    """Starts Prometheus, and waits until it is ready. Raises CannotStartError."""
    program = shutil.which("prometheus")
    if program is None:
        raise CannotStartError(NO_PROMETHEUS)
    (directory / "prometheus.yml").write_text(configuration(discovery))
    log = directory / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={(data or directory / 'prometheus').absolute()}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=output,
            start_new_session=True,  # a terminal's Ctrl-C is for this process
        )
    try:
        deadline = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < deadline:
            if is_ready(f"http://127.0.0.1:{port}/-/ready"):
                return process
            time.sleep(0.1)
        raise CannotStartError(f"Prometheus did not start:\n{log.read_text(errors='replace')[-2000:]}")
    except BaseException:
        stop([process])
        raise


def start_grafana(directory: Path, prometheus_port: int, port: int) -> subprocess.Popen[bytes] | None:
    """Starts Grafana for everyone on this machine, without a login. Returns None where it is not installed."""
    server = shutil.which("grafana-server") or shutil.which("grafana")
    if server is None:
        return None
    home = Path(os.environ.get("GRAFANA_HOME", "/usr/share/grafana"))
    command = [server] if Path(server).name == "grafana-server" else [server, "server"]
    settings = {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_PATHS_DATA": str(directory / "grafana"),
        "GF_PATHS_LOGS": str(directory / "grafana"),
        "GF_PATHS_PROVISIONING": str(HERE / "grafana" / "provisioning"),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "TWINKLE_SERVE_PROMETHEUS": f"http://127.0.0.1:{prometheus_port}",
        "TWINKLE_SERVE_DASHBOARDS": str(HERE / "grafana" / "dashboards"),
    }
    with (directory / "grafana.log").open("wb") as output:
        return subprocess.Popen(
            [*command, "--homepath", str(home)],
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def is_ready(url: str) -> bool:
    """Whether a URL answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends processes, and waits for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    typer.run(main)
