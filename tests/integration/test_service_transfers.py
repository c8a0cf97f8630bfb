"""vLLM's own weight transfer to the two engines of a service, which are one group with their trainer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.deploy import deployed
from tests.support.eventually import wait_until
from tests.support.processes import replica_process
from tests.support.ray_cluster import ray_cluster
from tests.support.tcp_trainer import TCPTrainer
from tests.support.transfer_plugin import TCP, write_plugin
from tests.support.weights import changed_weights, differences
from twinkle_serve import SampleResponse, hub
from twinkle_serve.errors import WeightsError
from twinkle_serve.sampler import RunningSampler

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.nightly,
    pytest.mark.own_cluster,
    pytest.mark.timeout(600),
]
NAME = "transfers"
ENGINES = {"engine-dp0", "engine-dp1"}
QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a + 3}="}]} for a in range(30, 38)]
LONG = {"max_tokens": 200, "ignore_eos": True}
SHORT = {"max_tokens": 6, "ignore_eos": True}
ENGINE_ARGS = {
    "dtype": "float32",
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2**27,
    "weight_transfer_config": {"backend": TCP},
}
DYING_TRAINER = """
import sys, time
from tests.support.tcp_trainer import TCPTrainer
from tests.support.weights import changed_weights
from twinkle_serve import connect

def waits(index):
    if index == 20:
        print("in the middle", flush=True)
        time.sleep(600)

trainer = TCPTrainer(connect(sys.argv[1])._client)
trainer.at = waits
trainer.update("dead", changed_weights(9))
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSampler]:
    plugin = tmp_path_factory.mktemp("plugin")
    write_plugin(plugin)
    with pytest.MonkeyPatch.context() as patch:
        root = str(Path(__file__).parents[2])
        patch.setenv("PYTHONPATH", f"{plugin}:{root}")  # of the processes of engines
        with (
            ray_cluster(num_cpus=8),
            deployed(NAME, engine="vllm", device_mesh={"dp_size": 2}, engine_args=ENGINE_ARGS) as sampler,
        ):
            yield sampler


@pytest.fixture
def trainer(service: RunningSampler) -> TCPTrainer:
    return TCPTrainer(service._client)


def all_ready(service: RunningSampler) -> bool:
    return {engine["state"] for engine in service.status()["engines"].values()} == {"ready"}


def check(response: SampleResponse, versions: dict[str, Any]) -> set[tuple[str, str]]:
    """Each token has the logprob that the version it names gives it. Returns engines and versions."""
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(hub.DEMO, dtype=torch.float32)
    found = set()
    for label, weights in versions.items():
        model = type(base).from_pretrained(None, config=base.config, state_dict=dict(weights), dtype=torch.float32)
        for sequence, difference in zip(response.sequences, differences(model.eval(), response.sequences), strict=True):
            for span in sequence.weight_versions:
                assert span.version in versions
                if span.version == label:
                    assert np.max(difference[span.start : span.end], initial=0.0) < 1e-3, f"{span}"
                    found.add((sequence.engine, label))
    return found


def test_both_engines_take_weights_from_one_trainer(service: RunningSampler, trainer: TCPTrainer) -> None:
    """While they sample; each token names the version that sampled it."""
    versions = {label: changed_weights(seed) for seed, label in enumerate(("first", "second"), start=1)}
    assert trainer.update("first", versions["first"]) == "first"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(service.sample, QUESTIONS, LONG, num_samples=4)
        assert trainer.update("second", versions["second"]) == "second"
        check(running.result(), versions)
    after = service.sample(QUESTIONS, SHORT, num_samples=2)
    assert check(after, versions) == {(engine, "second") for engine in ENGINES}
    (targets,) = trainer.connections
    assert {target.engine for target in targets} == ENGINES


def test_engine_that_is_killed_in_the_middle(service: RunningSampler, trainer: TCPTrainer) -> None:
    """The other one has the version, and the new process comes back with it, from the store."""
    weights = changed_weights(3)

    def kills(index: int) -> None:
        if index == 20:
            replica_process(NAME, "engine-dp1").kill()

    trainer.at = kills
    assert trainer.update("third", weights) == "third"
    trainer.at = lambda index: None
    assert check(service.sample(QUESTIONS, SHORT), {"third": weights})
    wait_until(lambda: all_ready(service), "the engine is back", 120)
    assert check(service.sample(QUESTIONS, SHORT, num_samples=2), {"third": weights}) == {
        (engine, "third") for engine in ENGINES
    }
    fourth = changed_weights(4)
    assert trainer.update("fourth", fourth) == "fourth"
    assert len(trainer.connections) == 2, "a new process has to be connected to"
    assert check(service.sample(QUESTIONS, SHORT, num_samples=2), {"fourth": fourth}) == {
        (engine, "fourth") for engine in ENGINES
    }


def test_trainer_that_is_killed_in_the_middle(service: RunningSampler, trainer: TCPTrainer) -> None:
    """The engines, which wait for the rest, go back to the version before; the next trainer finds them well."""
    weights = changed_weights(5)
    assert trainer.update("fifth", weights) == "fifth"
    with subprocess.Popen([sys.executable, "-c", DYING_TRAINER, NAME], stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdout is not None
        assert dying.stdout.readline() == "in the middle\n"
        dying.kill()
    response = service.sample(QUESTIONS, SHORT, num_samples=2, timeout_s=180)
    assert check(response, {"fifth": weights}), "not of the one that was sent in part"
    wait_until(lambda: all_ready(service), "both engines are in use", 180)
    sixth = changed_weights(6)
    assert trainer.update("sixth", sixth) == "sixth"
    assert check(service.sample(QUESTIONS, SHORT, num_samples=2), {"sixth": sixth}) == {
        (engine, "sixth") for engine in ENGINES
    }


def test_weights_that_differ_from_the_store(service: RunningSampler, trainer: TCPTrainer) -> None:
    """On any engine: both go back."""
    weights = changed_weights(7)
    assert trainer.update("seventh", weights) == "seventh"
    other = {**weights, "model.norm.weight": weights["model.norm.weight"] * 1.001}
    with pytest.raises(WeightsError, match=r"engine-dp\d: 1 of the 46 weights .* in the store"):
        trainer.update("eighth", weights, other)
    assert check(service.sample(QUESTIONS, SHORT, num_samples=2), {"seventh": weights}) == {
        (engine, "seventh") for engine in ENGINES
    }
