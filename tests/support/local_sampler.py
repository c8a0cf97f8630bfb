"""A sampler in this process, on the fake engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from twinkle_serve.config import ServiceArgs, TraceArgs
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.local import LocalClient

T = TypeVar("T")

QUESTION = {"messages": [{"role": "user", "content": "12+34="}]}
ENDLESS = {"max_tokens": 900, "ignore_eos": True}
TIMEOUT_S = 20.0


def make(*, traces: TraceArgs | None = None, **engine_args: Any) -> tuple[RunningSampler, LocalClient]:
    """A sampler, and its client."""
    args = {"model_id": "demo", "engine": "fake", "engine_args": engine_args, "traces": traces}
    backend = LocalClient(ServiceArgs.model_validate(args))
    return RunningSampler(backend), backend


def soon(call: Callable[[], T]) -> T:
    """What a call returns or raises; that it does either soon."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(TIMEOUT_S)
