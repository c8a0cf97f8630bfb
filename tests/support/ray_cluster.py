"""Ray clusters of the tests' own: in a directory of their own, on ports that are free, next to any other."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray import serve

from tests.support.service_logs import cluster_directory
from twinkle_serve.remote.clusters import start_cluster


@contextlib.contextmanager
def ray_cluster(num_cpus: int, *, with_serve: bool = True, with_http: bool = False, **options: Any) -> Iterator[str]:
    """A local cluster, with Serve and, if asked for, with HTTP; gone afterwards, processes and files. Yields its
    address."""
    before = set(psutil.Process().children(recursive=True))
    with cluster_directory() as directory:
        start_cluster(
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=directory,
            **options,
        )
        started = set(psutil.Process().children(recursive=True)) - before
        try:
            if with_serve:
                serve.start(http_options=_http_options() if with_http else {"location": "NoServer"})
            yield ray.get_runtime_context().gcs_address
        finally:
            if with_serve:
                serve.shutdown()
            ray.shutdown()
            _, alive = psutil.wait_procs(started, timeout=60)
            assert not alive, f"Ray left processes behind: {alive}"


def _http_options() -> dict[str, Any]:
    return {"location": "HeadOnly", "host": "127.0.0.1", "port": free_port()}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
