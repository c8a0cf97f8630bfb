"""Services that cannot be deployed, on a real Ray cluster."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray import serve

from graphs.sampler import build
from tests.support.eventually import wait_until
from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import EngineArgsError, MeshError, ModelNotFoundError, ServiceNotReadyError, TwinkleServeError
from twinkle_serve.sampler.connect import deploy as deploy_service

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"device_mesh": {"dp_size": 99, "device_type": "cpu"}}, MeshError, r"needs 99 CPUs .*, the cluster has 32"),
        ({"engine_args": {"max_len": 1}}, EngineArgsError, "unknown vllm engine argument 'max_len'"),
        ({"model_id": "/none"}, ModelNotFoundError, "no directory at /none"),
    ],
)
def test_service_that_cannot_be_fails_as_it_is_built(
    bad: dict[str, Any], error: type[TwinkleServeError], message: str
) -> None:
    """Instead of waiting for devices that do not come, or for an engine to find out."""
    with pytest.raises(error, match=message):
        build(ServiceArgs.model_validate({"model_id": "demo", "device_mesh": {"device_type": "cpu"}, **bad}))


def test_deploy_that_finds_no_room_ends_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores that somebody else holds: nothing waits for ever, and nothing is left behind."""
    monkeypatch.setattr("twinkle_serve.timing.ROUTER_GRACE_S", 0.5)

    @ray.remote(num_cpus=ray.available_resources()["CPU"] - 1)
    class Greedy:
        def here(self) -> bool:
            return True

    holder = Greedy.remote()  # type: ignore[attr-defined]
    assert ray.get(holder.here.remote(), timeout=60)
    args = {"model_id": "demo", "engine": "fake", "device_mesh": {"dp_size": 2, "device_type": "cpu"}}
    with pytest.raises(ServiceNotReadyError, match=r"was not up within startup_timeout_s=2, and is deleted"):
        deploy_service("crowded", ServiceArgs.model_validate({**args, "startup_timeout_s": 2.0}), build)
    ray.kill(holder)
    wait_until(lambda: "crowded" not in serve.status().applications, "it is deleted")


@pytest.mark.nightly
def test_deploy_that_fails_leaves_nothing() -> None:
    """Nobody has an object to shut it down with; an engine that did start would keep its devices."""
    args = {
        "model_id": "demo",
        "engine": "torch",
        "device_mesh": {"device_type": "cpu"},
        "engine_args": {"max_model_len": 99_999},
    }
    with pytest.raises(ServiceNotReadyError, match="'failing' is DEPLOY_FAILED: EngineArgsError"):
        deploy_service("failing", ServiceArgs.model_validate(args), build)
    wait_until(lambda: "failing" not in serve.status().applications, "it is deleted")
