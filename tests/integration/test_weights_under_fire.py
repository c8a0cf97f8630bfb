"""Weights and adapters are published all the time, engines and the store die, and every sample is of the versions that
it names."""

from __future__ import annotations

import time

import pytest

from tests.support.deploy import deployed
from tests.support.under_fire import ENGINE_ARGS, check, samples_under_fire

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.nightly, pytest.mark.timeout(1800)]


def test_every_sample_is_of_the_versions_that_it_names(cluster: None) -> None:
    """32 requests in flight on two adapters and the model, a version every 200 ms, each engine killed in turn, and the
    store several times."""
    with deployed("fire", engine="vllm", device_mesh={"dp_size": 2}, engine_args=ENGINE_ARGS) as sampler:
        sequences, published, versions = samples_under_fire(sampler, "fire")
    started = time.monotonic()
    others, mixed = check(sequences, published)
    print(
        f"{len(sequences)} sequences, {mixed} of several versions of the model; {versions} versions; "
        f"{others} spans against others; scored in {time.monotonic() - started:.0f} s"
    )
    assert {sequence.engine for sequence in sequences} == {"engine-dp0", "engine-dp1"}
    assert others > 50 and mixed > 10
