"""Which Ray cluster is joined, without Ray: only what runs on this machine is looked at."""

from __future__ import annotations

import contextlib
import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.eventually import wait_until
from twinkle_serve import connect
from twinkle_serve.errors import ConfigError, ServiceNotReadyError
from twinkle_serve.remote.clusters import Found, find_cluster, join_cluster, require_listener


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def raylet(address: str, temp_dir: Path) -> Iterator[None]:
    """A process that looks like the raylet of a cluster."""
    flags = [f"--gcs-address={address}", f"--temp_dir={temp_dir}"]
    sleep = ["-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(["/opt/ray/raylet", *sleep, *flags], executable=sys.executable)
    try:
        cmdline = Path(f"/proc/{process.pid}/cmdline")
        wait_until(lambda: address in cmdline.read_text(), "it has begun")
        yield
    finally:
        process.kill()
        process.wait()


def test_address_comes_before_the_environment_and_the_environment_before_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """address, RAY_ADDRESS, RAY_TMPDIR, this machine; each says where it is from."""
    own, other = tmp_path / "own", tmp_path / "other"
    with raylet("10.0.0.1:1", own / "ray"), raylet("10.0.0.2:2", other / "ray"):
        monkeypatch.setenv("RAY_TMPDIR", str(own))
        assert find_cluster() == Found("10.0.0.1:1", f"RAY_TMPDIR={own}")
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.3:3")
        assert find_cluster() == Found("10.0.0.3:3", "RAY_ADDRESS=10.0.0.3:3")
        assert find_cluster("10.0.0.4:4") == Found("10.0.0.4:4", "address=10.0.0.4:4")


def test_cluster_of_another_directory_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RAY_TMPDIR, a stranger's cluster on this machine is none; a link to the directory is the directory."""
    with raylet("10.0.0.1:1", tmp_path / "theirs" / "ray"):
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "mine"))
        assert find_cluster() is None
        (tmp_path / "link").symlink_to(tmp_path / "theirs")
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "link"))
        assert find_cluster() == Found("10.0.0.1:1", f"RAY_TMPDIR={tmp_path / 'link'}")


def test_one_of_several_clusters_is_not_guessed(tmp_path: Path) -> None:
    """The error names them, and what to set."""
    both = r"several Ray clusters run here .*10.0.0.1:1, 10.0.0.2:2.* Set RAY_ADDRESS"  # others may run here too
    with (
        raylet("10.0.0.1:1", tmp_path / "a"),
        raylet("10.0.0.2:2", tmp_path / "b"),
        pytest.raises(ServiceNotReadyError, match=both),
    ):
        find_cluster()


def test_nodes_of_one_cluster_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two raylets of one address, as a cluster for tests has on one machine."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with raylet("10.0.0.1:1", tmp_path), raylet("10.0.0.1:1", tmp_path):
        assert find_cluster() == Found("10.0.0.1:1", f"RAY_TMPDIR={tmp_path}")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:port", "127.0.0.1:1", "127.0.0.1:99999", ":8"])
def test_address_where_no_cluster_can_be_is_refused_at_once(address: str) -> None:
    """By its name, also if it is no address at all."""
    with pytest.raises(ServiceNotReadyError, match=f"address={address}"):
        require_listener(Found(address, f"address={address}"))
    with pytest.raises(ServiceNotReadyError, match=f"address={address}"):
        connect(address=address)


def test_address_of_something_other_than_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An HTTP server, such as Ray's dashboard, and one that accepts connections and never answers."""
    monkeypatch.setattr("twinkle_serve.remote.clusters.LISTENS_S", 0.3)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ServiceNotReadyError, match="something other than Ray listens there"):
            connect(address=f"127.0.0.1:{server.server_port}")
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServiceNotReadyError, match="timed out"):
        connect(address=f"127.0.0.1:{silent.getsockname()[1]}")


def test_token_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sent to the cluster."""
    monkeypatch.setattr("twinkle_serve.remote.clusters.require_listener", lambda found: None)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nonexistent")
    with pytest.raises(ServiceNotReadyError, match=r"RAY_AUTH_TOKEN_PATH .*/nonexistent"):
        join_cluster(Found("127.0.0.1:1", "a test"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 5}, "name must be a string, got 5"),
        ({"address": 6379}, "address must be host:port, got 6379"),
        ({"address": "local"}, "Ray would start a new one"),
        ({"timeout_s": "long"}, "timeout_s must be a number, got 'long'"),
        ({"timeout_s": -1}, "timeout_s must be at least 0, got -1"),
    ],
)
def test_connect_refuses_what_it_cannot_take(arguments: dict[str, object], message: str) -> None:
    """Before it looks for a cluster."""
    with pytest.raises(ConfigError, match=message):
        connect(**arguments)  # type: ignore[arg-type]
