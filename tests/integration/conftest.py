"""Ray clusters of the tests' own: in a directory of their own, on ports that are free, next to any other."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import ray
from ray import serve

from graphs.sampler import build
from tests.processes import with_title
from twinkle_serve import connect
from twinkle_serve.config import ServiceArgs
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.connect import wait_for_engines


@contextlib.contextmanager
def ray_cluster(num_cpus: int, **options: Any) -> Iterator[None]:
    """A local cluster with Serve and without HTTP; gone afterwards, processes and files."""
    before = set(psutil.Process().children(recursive=True))
    directory = tempfile.mkdtemp(prefix="tst")  # short: socket paths are limited
    ray.init(
        address="local",
        num_cpus=num_cpus,
        namespace="serve",
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=directory,
        **options,
    )
    started = set(psutil.Process().children(recursive=True)) - before
    try:
        serve.start(http_options={"location": "NoServer"})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        _, alive = psutil.wait_procs(started, timeout=30)
        shutil.rmtree(directory, ignore_errors=True)
        assert not alive, f"Ray left processes behind: {alive}"


def deploy(name: str, **args: Any) -> RunningSampler:
    """The application of these arguments, running."""
    args.setdefault("model_id", "demo")
    args["device_mesh"] = {"device_type": "cpu", **args.get("device_mesh", {})}
    serve.run(build(ServiceArgs.model_validate(args)), name=name, route_prefix=None)
    sampler = connect(name)
    wait_for_engines(sampler._client, 120.0)
    return sampler


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Asks again and again, and leaves the cores to whoever is to bring it about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def replica_process(app: str, deployment: str) -> psutil.Process:
    """The process of a deployment's only replica."""
    found = with_title(f"ServeReplica:{app}:{deployment}")
    assert len(found) == 1, found
    return found[0]
