"""A short run of the chaos suite: what `scripts/chaos` does for longer."""

from __future__ import annotations

import pytest

from benchmarks.chaos.record import Options
from benchmarks.chaos.report import as_json, summary
from benchmarks.chaos.run import run

SEED = 4
"""The first events are of the router, a trainer, an engine and the controller."""
BOUND_S = 300.0
"""An engine imports vLLM in three processes in turn: 75 s on two busy cores, 150 s where others want them as well."""


@pytest.mark.timeout(1200)
def test_nothing_is_lost_doubled_or_mislabelled_while_processes_die() -> None:
    """Two minutes of events on two vLLM engines, and every sample scored again by transformers."""
    done = run(Options(engine="vllm", minutes=2, seed=SEED, period_s=3, calm_s=10, bound_s=BOUND_S))
    print(summary(as_json(done, "pytest")))
    assert done.findings == []
    assert len(done.events) >= 3 and all(event.recovered_s is not None for event in done.events)
    assert done.reference is not None and done.reference.samples > 1000 and done.compared > 10
