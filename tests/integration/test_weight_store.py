"""Adapters outlive every process of the service that knows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from tests.support.deploy import deploy
from tests.support.eventually import wait_until
from tests.support.lora import save_adapter
from tests.support.processes import replica_process
from tests.support.ray_cluster import ray_cluster
from tests.support.weights import changed_weights
from twinkle_serve import SampleResponse
from twinkle_serve.errors import AdapterError, TwinkleServeError
from twinkle_serve.sampler.service import ServiceSampler

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(10, 18)]
PARAMS = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
ARGS: dict[str, Any] = {"engine": "fake", "engine_args": {"max_model_len": 256}}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(num_cpus=8):
        yield


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return [save_adapter(directory / str(seed), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def service() -> ServiceSampler:
    """Two engines, two versions of each adapter."""
    return deploy("stored", device_mesh={"dp_size": 2}, adapter_versions=2, **ARGS)


def same(one: SampleResponse, other: SampleResponse) -> bool:
    return one.columns.tokens.tolist() == other.columns.tokens.tolist() and one.columns.adapter == other.columns.adapter


def kill(*deployments: str) -> None:
    for process in [replica_process("stored", deployment) for deployment in deployments]:
        process.kill()


@pytest.mark.parametrize(
    "killed", [("store",), ("router",), ("store", "engine-dp0"), ("store", "router", "engine-dp0", "engine-dp1")]
)
def test_versions_are_there_again_after_a_death(
    service: ServiceSampler, paths: list[Path], killed: tuple[str, ...]
) -> None:
    """The same labels mean the same weights on every engine; the next version counts on; the base model is itself."""
    name = "-".join(killed)
    first = service.add_adapter_to_model(name, paths[0])
    second = service.add_adapter_to_model(name, paths[1])
    assert (first, second) == (f"{name}@1", f"{name}@2")
    expected = {label: service.sample(QUESTIONS, PARAMS, label) for label in (first, second, "")}
    assert len({tuple(response.columns.tokens.tolist()) for response in expected.values()}) == 3
    kill(*killed)

    def answered_by_both() -> bool:
        engines: set[str] = set()
        for label, before in expected.items():
            try:
                again = service.sample(QUESTIONS, PARAMS, label, timeout_s=30)
            except TwinkleServeError:  # the call was on its way when something died
                return False
            assert same(again, before)
            engines |= set(again.columns.engine)
        return engines == {"engine-dp0", "engine-dp1"}

    wait_until(answered_by_both, "both engines answer", 60)
    assert service.add_adapter_to_model(name, paths[0]) == f"{name}@3"
    assert same(service.sample(QUESTIONS, PARAMS, second), expected[second]), "the version before can still be named"
    with pytest.raises(AdapterError, match="unknown adapter"):
        service.sample(QUESTIONS, PARAMS, first)
    service.remove_adapter(name)


def test_service_that_is_deployed_anew_finds_its_state_dir(paths: list[Path], tmp_path: Path) -> None:
    """As it was left, and the config's adapters are not put twice. Without a state_dir, shutdown leaves none."""
    args = {**ARGS, "adapters": {"fixed": str(paths[0])}}
    for state in ({"state_dir": str(tmp_path)}, {}):
        before = deploy("again", **args, **state)
        assert before.add_adapter_to_model("grown", paths[1]) == "grown@1"
        before.update_weights(changed_weights(1), "one")
        expected = before.sample(QUESTIONS, PARAMS, "grown")
        before.shutdown()
        assert "again" not in serve.status().applications
        after = deploy("again", **args, **state)
        found = after.status()["adapters"]
        assert set(found) == ({"fixed", "grown"} if state else {"fixed"})
        assert after.status()["weights"] == ("one" if state else "initial")
        if state:
            assert found == {"fixed": "fixed@1", "grown": "grown@1"}
            assert same(after.sample(QUESTIONS, PARAMS, "grown"), expected)
        after.shutdown()
