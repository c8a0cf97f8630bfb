"""Ray clusters of the tests' own: in a directory of their own, on ports that are free, next to any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray import serve

from tests.support.service_logs import cluster_directory
from twinkle_serve.remote.clusters import start_cluster


@contextlib.contextmanager
def ray_cluster(num_cpus: int, *, with_serve: bool = True, **options: Any) -> Iterator[str]:
    """A local cluster, with Serve and without HTTP; gone afterwards, processes and files. Yields its address."""
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
                serve.start(http_options={"location": "NoServer"})
            yield ray.get_runtime_context().gcs_address
        finally:
            if with_serve:
                serve.shutdown()
            ray.shutdown()
            _, alive = psutil.wait_procs(started, timeout=60)
            assert not alive, f"Ray left processes behind: {alive}"
