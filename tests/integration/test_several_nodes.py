"""A service on two nodes, started as docs/how-to.md says: Ray on each, scripts/serve on the head, vLLM on both."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from tests.support.eventually import wait_until
from tests.support.lora import save_adapter
from tests.support.nodes import Nodes, two_nodes
from tests.support.processes import has_ended, replica_process
from tests.support.scripts_serve import config_with, ended, ready, start
from tests.support.service import QUESTIONS
from tests.support.under_fire import ENGINE_ARGS, check, samples_under_fire
from tests.support.weights import Reference, changed_weights
from twinkle_serve import SampledSequence, connect
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.bucket_sending import ObjectStoreSender, sending

pytestmark = [
    pytest.mark.ray,
    pytest.mark.own_cluster,
    pytest.mark.vllm,
    pytest.mark.nightly,
    pytest.mark.timeout(1500),  # two engines start three times, on cores that they share
]
NAME = "sampler"
PARAMS = {"max_tokens": 16, "ignore_eos": True}
ENGINES = {"engine-dp0", "engine-dp1"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes(cpus=2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def sampler(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSampler]:
    """The sampler of `scripts/serve` with two engines, which ends by Ctrl-C and leaves nothing behind."""
    directory = tmp_path_factory.mktemp("several_nodes")
    mesh = {"dp_size": 2, "tp_size": 1, "device_type": "cpu"}
    config = config_with(directory / "config.yaml", device_mesh=mesh, engine_args=ENGINE_ARGS)
    launcher = start(config, nodes.environment, directory / "log")
    try:
        ready(launcher, directory / "log")
        yield connect(NAME, address=nodes.address)
        ray.shutdown()
        launcher.send_signal(signal.SIGINT)
        assert ended(launcher, 60) == 0, (directory / "log").read_text()[-4000:]
    finally:
        if launcher.poll() is None:
            launcher.kill()


def state(sampler: RunningSampler, engine: str) -> str:
    return str(sampler.status()["engines"][engine]["state"])


def engine_of_other_node(nodes: Nodes) -> str:
    (engine,) = (name for name in ENGINES if nodes.other.holds(replica_process(NAME, name)))
    return engine


def kill(process: psutil.Process) -> None:
    process.kill()
    wait_until(lambda: has_ended(process), f"{process} is gone")


def require_versions(
    sequences: Sequence[SampledSequence], reference: Reference, weights: dict[str, Any], adapter: Path | None
) -> None:
    """Raises unless the samples' logprobs are those of weights and an adapter, by transformers."""
    for sequence in sequences[::5]:
        prompt = sequence.response.prompts[int(sequence.response.columns.group[sequence.row])].tolist()
        expected = reference.logprobs(weights, [*prompt, *sequence.tokens], adapter)[len(prompt) - 1 :]
        assert sequence.logprob_array is not None
        np.testing.assert_allclose(sequence.logprob_array, expected, atol=1e-3)


def test_engines_are_spread_over_the_nodes(nodes: Nodes, sampler: RunningSampler) -> None:
    """One on each, though each node has room for both; and both sample."""
    other = engine_of_other_node(nodes)
    (here,) = ENGINES - {other}
    assert nodes.head.holds(replica_process(NAME, here))
    response = sampler.sample(QUESTIONS, PARAMS, num_samples=4)
    assert {sequence.engine for sequence in response.sequences} == ENGINES


def test_engine_of_another_node_dies_during_an_update_and_catches_up(
    nodes: Nodes, sampler: RunningSampler, tmp_path: Path
) -> None:
    """Buckets go through Ray's object store. The other engine has the version when the update is done, and the one that
    died when it is back, with an adapter as well; logprobs are those of transformers."""
    with sending() as sender:
        assert type(sender) is ObjectStoreSender
    weights, path = changed_weights(1), save_adapter(tmp_path / "adapter", seed=1)
    victim = engine_of_other_node(nodes)
    (survivor,) = ENGINES - {victim}
    reference = Reference()

    def dying() -> Iterator[tuple[str, Any]]:
        """The weights; the engine is killed when half of them are sent."""
        for number, pair in enumerate(weights.items()):
            if number == len(weights) // 2:
                kill(replica_process(NAME, victim))
            yield pair

    sampler.update_weights(dying(), "during", bucket_bytes=2**18)
    label = sampler.add_adapter_to_model("red", str(path))
    for name, adapter in (("", None), ("red", path)):
        sequences = sampler.sample(QUESTIONS, PARAMS, name, num_samples=4).sequences
        assert {sequence.engine for sequence in sequences} <= ENGINES
        require_versions(sequences, reference, weights, adapter)
    wait_until(lambda: state(sampler, victim) == "ready", f"{victim} is back", 300)
    for name, adapter in (("", None), ("red", path)):
        for engine in (victim, survivor):
            sequences = sampler.sample(QUESTIONS, PARAMS, name, num_samples=4, engine=engine).sequences
            assert {sequence.engine for sequence in sequences} == {engine}
            assert {span.version for sequence in sequences for span in sequence.weight_versions} == {"during"}
            assert {sequence.adapter for sequence in sequences} == {label if name else ""}
            require_versions(sequences, reference, weights, adapter)
    sampler.remove_adapter("red")


def test_every_sample_is_of_the_versions_that_it_names_on_two_nodes(nodes: Nodes, sampler: RunningSampler) -> None:
    """Under load, a version of the model or of an adapter each 200 ms, each engine killed in turn, and the store
    several times."""
    sampler.update_weights(changed_weights(0, scale=0.0), "initial again")
    sequences, published, versions = samples_under_fire(sampler, NAME)
    began = time.monotonic()
    others, mixed = check(sequences, published)
    print(
        f"{len(sequences)} sequences, {mixed} of several versions of the model; {versions} versions; "
        f"{others} spans against others; scored in {time.monotonic() - began:.0f} s"
    )
    assert {sequence.engine for sequence in sequences} == ENGINES
    assert others > 50 and mixed > 10
