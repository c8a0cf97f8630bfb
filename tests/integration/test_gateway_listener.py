"""A gateway that listens itself, where Serve has no HTTP proxy."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
from ray import serve

from graphs.gateway import build
from tests.support.deploy import deployed
from tests.support.eventually import wait_until
from tests.support.scripts_serve import free_port
from twinkle_serve.gateway.config import GatewayArgs

pytestmark = pytest.mark.ray


def complete(port: int) -> dict[str, Any]:
    body = json.dumps({"prompt": "12+34=", "max_tokens": 4, "ignore_eos": True}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.nightly
def test_a_gateway_answers_at_its_own_address_while_its_replicas_change(cluster: str) -> None:
    """One replica, then two that share the address; the address is free once the gateway is deleted."""
    port = free_port()
    with deployed("listened", engine="fake"):
        try:
            for count in (1, 2):
                args = {"samplers": {"sampler": "listened"}, "listen": f"127.0.0.1:{port}", "num_replicas": count}
                serve.run(build(GatewayArgs.model_validate(args)), name="listening", route_prefix=None)
                wait_until(lambda: answers(port), "the gateway answers")
                assert complete(port)["usage"]["completion_tokens"] == 4
        finally:
            serve.delete("listening")
    assert not answers(port)
