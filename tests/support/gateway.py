"""Gateways deployed from keyword arguments."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client

from graphs.gateway import build
from tests.support.eventually import wait_until
from twinkle_serve.gateway.config import GatewayArgs

NAME = "gateway"


@contextlib.contextmanager
def gateway_url(**args: Any) -> Iterator[str]:
    """A gateway on the cluster, which needs Serve with HTTP; one at a time. Yields its URL, without a slash at the end.

    Args:
        args: of the gateway's config.
    """
    serve.run(build(GatewayArgs.model_validate(args)), name=NAME, route_prefix="/")
    client: Any = _get_global_client()
    url = f"http://127.0.0.1:{client.http_config.port}"
    try:
        wait_until(lambda: answers(f"{url}/healthz"), "the gateway answers")
        yield url
    finally:
        serve.delete(NAME)
        wait_until(lambda: not answers(f"{url}/healthz"), "the gateway is gone")


def answers(url: str) -> bool:
    """Whether a URL answers with 200. Serve's proxy answers with 404 where there is no application."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
