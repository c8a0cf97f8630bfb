"""The model's own weights outlive every process of the service, and every engine that is used has the current ones."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.support.deploy import deploy
from tests.support.eventually import wait_until
from tests.support.processes import replica_process
from tests.support.ray_cluster import ray_cluster
from tests.support.weights import changed_weights
from twinkle_serve import SampleResponse
from twinkle_serve.errors import TwinkleServeError, WeightsError
from twinkle_serve.sampler.service import ServiceSampler

QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(10, 26)]
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
ARGS: dict[str, Any] = {"engine": "fake", "engine_args": {"max_model_len": 256}}
LABELS = (f"step-{number}" for number in itertools.count(1))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(num_cpus=8):
        yield


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    return changed_weights(1)


@pytest.fixture(scope="module")
def service() -> ServiceSampler:
    return deploy("based", device_mesh={"dp_size": 2}, **ARGS)


def labels_of(response: SampleResponse) -> set[str]:
    return {span.version for sequence in response.sequences for span in sequence.weight_versions}


@pytest.mark.parametrize(
    "killed", [("engine-dp0",), ("store",), ("router",), ("store", "router", "engine-dp0", "engine-dp1")]
)
def test_current_weights_are_there_again_after_a_death(
    service: ServiceSampler, weights: dict[str, Any], killed: tuple[str, ...]
) -> None:
    """Whatever dies, no sample comes from other weights, and the next update finds everything in place."""
    label = next(LABELS)
    service.update_weights(weights, label, bucket_bytes=2**20)
    expected = service.sample(QUESTIONS, GREEDY)
    assert labels_of(expected) == {label}
    for process in [replica_process("based", deployment) for deployment in killed]:
        process.kill()

    def answered_by_both() -> bool:
        try:
            again = service.sample(QUESTIONS, GREEDY, timeout_s=30)
        except TwinkleServeError:  # the call was on its way when something died
            return False
        assert labels_of(again) == {label}
        assert again.columns.tokens.tolist() == expected.columns.tokens.tolist()
        return set(again.columns.engine) == {"engine-dp0", "engine-dp1"}

    wait_until(answered_by_both, "both engines answer", 60)
    with pytest.raises(WeightsError, match="exists already"):
        service.update_weights(weights, label)
    newer = next(LABELS)
    service.update_weights(weights, newer)
    assert labels_of(service.sample(QUESTIONS, GREEDY)) == {newer}


def test_engine_that_dies_in_an_update_comes_back_current(service: ServiceSampler, weights: dict[str, Any]) -> None:
    """The others have the new version, and it has it too before it is used."""
    label = next(LABELS)

    def killing() -> Iterator[tuple[str, Any]]:
        yield from itertools.islice(weights.items(), 40)
        replica_process("based", "engine-dp1").kill()
        yield from itertools.islice(weights.items(), 40, None)

    service.update_weights(killing(), label, bucket_bytes=2**19)

    def states() -> dict[str, Any]:
        return {name: (engine["state"], engine.get("weights")) for name, engine in service.status()["engines"].items()}

    wait_until(lambda: states()["engine-dp1"] == ("ready", label), "engine-dp1 is back with the new weights", 60)
    assert states()["engine-dp0"] == ("ready", label)
    assert labels_of(service.sample(QUESTIONS, GREEDY)) == {label}


TRAINER = """
import signal, sys
import ray
from tests.support.weights import changed_weights
from twinkle_serve import connect

ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False)
sampler = connect("based")
if sys.argv[2] == "update":
    def weights():
        for number, pair in enumerate(changed_weights(2).items()):
            yield pair
            if number == 30:
                print("halfway", flush=True)
                signal.pause()
    sampler.update_weights(weights(), "never", bucket_bytes=2**18)
else:
    with sampler.pause(lease_s=2.0):
        print("paused", flush=True)
        signal.pause()
"""


def killed_trainer(what: str) -> None:
    """A trainer in a process of its own, which is killed in the middle of it."""
    address = ray.get_runtime_context().gcs_address
    root = str(Path(__file__).parents[2])
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, address, what],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline().strip() in ("halfway", "paused")
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()


def test_trainer_that_dies_while_it_sends_leaves_nothing(service: ServiceSampler, weights: dict[str, Any]) -> None:
    """The version before goes on; a second trainer is refused while the first may live, and told for how long."""
    before = service.status()["weights"]
    killed_trainer("update")
    assert service.status()["weights"] == before
    assert labels_of(service.sample(QUESTIONS, GREEDY)) == {before}
    with pytest.raises(WeightsError, match=r"an update to 'never' is under way, heard of .* given up after 60 s"):
        service.update_weights(weights, next(LABELS))
    replica_process("based", "router").kill()  # a router that begins drops it at once

    def taken() -> bool:
        try:
            service.update_weights(weights, next(LABELS))
        except TwinkleServeError:
            return False
        return True

    wait_until(taken, "an update is taken", 60)


def test_trainer_that_dies_in_a_pause_does_not_leave_it_paused(service: ServiceSampler) -> None:
    """Its lease of 2 s ends."""
    killed_trainer("pause")
    assert len(service.sample(QUESTIONS, GREEDY, timeout_s=30).sequences) == len(QUESTIONS)
    assert not service.status()["paused"]
