"""Tinker's own SDK against a gateway: clients that end with their test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")

import tinker

KEY = "tml-a-key-of-tests"
"""The SDK takes keys of this form alone."""


@contextlib.contextmanager
def tinker_client(url: str, key: str = KEY, **options: Any) -> Iterator[tinker.ServiceClient]:
    """A client, with a session of its own."""
    client = tinker.ServiceClient(base_url=url, api_key=key, **options)
    try:
        yield client
    finally:
        client.close("success").result(timeout=60)


def tokens(*ids: int) -> tinker.ModelInput:
    """A prompt of token ids."""
    return tinker.ModelInput.from_ints(list(ids))


def params(**given: Any) -> tinker.SamplingParams:
    return tinker.SamplingParams(**given)
