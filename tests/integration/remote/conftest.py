"""A Ray cluster of two cores and four GPUs, which Ray only counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.support.eventually import wait_until
from tests.support.ray_cluster import ray_cluster
from tests.support.remote_objects import CPUS, GPUS, VISIBLE, free
from twinkle_serve.remote import known_groups, shutdown


@pytest.fixture(scope="package")
def cluster() -> Iterator[str]:
    """Its address."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
            address = stack.enter_context(ray_cluster(CPUS, num_gpus=GPUS, with_serve=False))
        yield address


@pytest.fixture(autouse=True)
def session(cluster: str) -> Iterator[None]:
    """Every test gives back all that it took."""
    yield
    shutdown()
    assert known_groups() == []
    wait_until(lambda: free() == (CPUS, GPUS), "all devices are free")
