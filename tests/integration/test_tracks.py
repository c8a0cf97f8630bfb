"""Tracks of a service: on vLLM, with an engine each; and engines that change their track, on the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support.deploy import deploy, deployed
from tests.support.eventually import wait_until
from tests.support.processes import replica_process
from tests.support.weights import Reference, changed_weights
from twinkle_serve import SampleResponse
from twinkle_serve.errors import DeadlineError, TwinkleServeError
from twinkle_serve.sampler import RunningSampler

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.usefixtures("cluster")]
QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in range(10, 18)]
PARAMS = {"max_tokens": 6, "ignore_eos": True, "seed": 5}
VLLM_ARGS = {"max_model_len": 1024, "dtype": "float32", "kv_cache_memory_bytes": 2**27}
LONG = {"max_tokens": 900, "ignore_eos": True}
ENGINES = {"main": "engine-dp0", "trial": "engine-dp1"}


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    return changed_weights(1)


@pytest.fixture(scope="module")
def service(cluster: None) -> Iterator[RunningSampler]:
    with deployed(
        "tracks", engine="vllm", device_mesh={"dp_size": 2}, tracks={"main": 1, "trial": 1}, engine_args=VLLM_ARGS
    ) as sampler:
        yield sampler


def labels_of(response: SampleResponse) -> set[str]:
    return {span.version for sequence in response.sequences for span in sequence.weight_versions}


def require(response: SampleResponse, track: str, label: str, model: dict[str, Any] | None) -> None:
    """By the engine of the track alone, with logprobs of the weights that the label names."""
    assert set(response.columns.engine) == {ENGINES[track]} and labels_of(response) == {label}
    reference = Reference()
    for sequence in response.sequences[:4]:
        prompt = response.prompts[sequence.prompt_index].tolist()
        expected = reference.logprobs(model, [*prompt, *sequence.tokens])[len(prompt) - 1 :]
        assert np.abs(expected - sequence.logprob_array).max() < 1e-3


def is_sampled(sampler: RunningSampler, track: str) -> bool:
    try:
        sampler.sample(QUESTIONS[:1], PARAMS, track=track, timeout_s=5)
    except TwinkleServeError:
        return False
    return True


def test_tracks_have_weights_of_their_own(service: RunningSampler, weights: dict[str, Any]) -> None:
    """One samples while the other is updated, and while its only engine is dead; each has its version again after the
    death of engine, router and store."""
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(service.sample, QUESTIONS, LONG, num_samples=2, track="trial")
        wait_until(lambda: service.status()["engines"]["engine-dp1"]["sequences"] > 0, "the trial samples")
        updating = pool.submit(service.update_weights, weights, "one", "wait", track="trial")
        wait_until(lambda: service.status()["engines"]["engine-dp1"]["state"] == "draining", "the trial is paused")
        for _ in range(3):
            require(service.sample(QUESTIONS, PARAMS), "main", "initial", None)
        assert not updating.done(), "the samples of the trial, which the update waits for, are longer"
        assert updating.result() == "one" and labels_of(running.result()) == {"initial"}
    require(service.sample(QUESTIONS, PARAMS, track="trial"), "trial", "one", weights)
    require(service.sample(QUESTIONS, PARAMS), "main", "initial", None)
    assert service.status()["tracks"] == {"main": "initial", "trial": "one"}

    replica_process("tracks", "engine-dp1").kill()
    with pytest.raises(DeadlineError, match="0 of 1 engines of track 'trial' are up"):
        service.sample(QUESTIONS, PARAMS, track="trial", timeout_s=4)
    require(service.sample(QUESTIONS, PARAMS), "main", "initial", None)
    wait_until(lambda: is_sampled(service, "trial"), "the trial's engine is back", 180)
    require(service.sample(QUESTIONS, PARAMS, track="trial"), "trial", "one", weights)

    for process in [replica_process("tracks", deployment) for deployment in ("router", "store")]:
        process.kill()
    wait_until(lambda: is_sampled(service, "trial") and is_sampled(service, "main"), "both tracks sample again", 120)
    require(service.sample(QUESTIONS, PARAMS, track="trial"), "trial", "one", weights)
    require(service.sample(QUESTIONS, PARAMS), "main", "initial", None)
    assert service.status()["tracks"] == {"main": "initial", "trial": "one"}
    scored = service.score([{"input_ids": [5, 6, 7]}], track="trial").prompt_logprobs
    assert scored != service.score([{"input_ids": [5, 6, 7]}]).prompt_logprobs

    assert service.use_weights("one") == "one"
    require(service.sample(QUESTIONS, PARAMS), "main", "one", weights)
    assert service.status()["tracks"] == {"main": "one", "trial": "one"}


def test_engines_change_their_track_with_the_config(weights: dict[str, Any]) -> None:
    """A redeployment replaces those alone: router, store and the other engines keep their processes."""

    def processes(*names: str) -> dict[str, psutil.Process]:
        return {name: replica_process("moving", name) for name in names}

    def tracks(sampler: RunningSampler) -> dict[str, tuple[str, str]]:
        return {name: (each["track"], each["state"]) for name, each in sampler.status()["engines"].items()}

    sampler = deploy("moving", engine="fake", device_mesh={"dp_size": 2}, tracks={"main": 1, "trial": 1})
    try:
        sampler.update_weights(weights, "one", track="trial")
        before = processes("router", "store", "engine-dp0", "engine-dp1")
        deploy("moving", engine="fake", device_mesh={"dp_size": 3}, tracks={"main": 2, "trial": 1})
        moved = {"engine-dp0": ("main", "ready"), "engine-dp1": ("main", "ready"), "engine-dp2": ("trial", "ready")}
        wait_until(lambda: tracks(sampler) == moved, "engine-dp1 is in main, engine-dp2 in the trial")
        wait_until(lambda: not before["engine-dp1"].is_running(), "the process of engine-dp1 is replaced")
        wait_until(lambda: tracks(sampler) == moved, "engine-dp1 is there again")
        kept = ("router", "store", "engine-dp0")
        assert processes(*kept) == {name: before[name] for name in kept}
        assert labels_of(sampler.sample(QUESTIONS, PARAMS, num_samples=4)) == {"initial"}
        trial = sampler.sample(QUESTIONS, PARAMS, track="trial")
        assert labels_of(trial) == {"one"} and set(trial.columns.engine) == {"engine-dp2"}
    finally:
        sampler.shutdown()
