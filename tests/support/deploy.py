"""Applications deployed from keyword arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray import serve

from graphs.sampler import build
from twinkle_serve import connect
from twinkle_serve.config import ServiceArgs
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.connect import wait_for_engines


def deploy(name: str, **args: Any) -> RunningSampler:
    """The application of these arguments, running."""
    args.setdefault("model_id", "demo")
    args["device_mesh"] = {"device_type": "cpu", **args.get("device_mesh", {})}
    serve.run(build(ServiceArgs.model_validate(args)), name=name, route_prefix=None)
    sampler = connect(name)
    wait_for_engines(sampler._client, 120.0)
    return sampler


@contextlib.contextmanager
def deployed(name: str, **args: Any) -> Iterator[RunningSampler]:
    """As `deploy`; shut down afterwards."""
    sampler = deploy(name, **args)
    try:
        yield sampler
    finally:
        sampler.shutdown()
