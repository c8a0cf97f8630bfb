"""Short runs of the chaos suite: what `scripts/chaos` does for longer."""

from __future__ import annotations

import pytest

from benchmarks.chaos.record import Options, Run
from benchmarks.chaos.report import as_json, summary
from benchmarks.chaos.run import run

pytestmark = [pytest.mark.ray, pytest.mark.own_cluster]
SEED = 4
"""The first events are of the store, the router, an engine, the controller and the gateway; on the fake engine, of an
engine, the gateway and the store."""
BOUND_S = 300.0
"""An engine imports vLLM in three processes in turn: 75 s on two busy cores, 150 s where others want them as well."""
KILLS = ("router killed", "store killed", "engine replica killed", "trainer killed", "gateway killed")


def checked(options: Options) -> Run:
    """A run in which nothing was lost, doubled or mislabelled, of trainers and of agents over HTTP."""
    done = run(options)
    print(summary(as_json(done, "pytest")))
    assert done.findings == []
    # A slow machine recovers from fewer in the same time.
    assert len(done.events) >= 2 and all(event.recovered_s is not None for event in done.events)
    assert done.compared > 10
    assert len(done.turns) > 10 and done.turns_scored >= len(done.turns)
    return done


@pytest.mark.nightly
def test_nothing_is_lost_or_doubled_while_processes_die() -> None:
    """A few kills, with two engines that take no time to start. A quarter of the samples is scored."""
    checked(
        Options(
            engine="fake",
            kinds=KILLS,
            minutes=0.4,
            seed=SEED,
            period_s=1,
            calm_s=1,
            bound_s=60,
            warm_up_s=1,
            settled_s=3,
            trainers=2,
            publish_s=1,
            share=0.25,
        )
    )


@pytest.mark.vllm
@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_nothing_is_lost_doubled_or_mislabelled_while_processes_die() -> None:
    """Two minutes of events on two vLLM engines, and every sample scored again by transformers."""
    done = checked(Options(engine="vllm", minutes=2, seed=SEED, period_s=3, calm_s=10, bound_s=BOUND_S))
    assert done.reference is not None and done.reference.samples > 1000
