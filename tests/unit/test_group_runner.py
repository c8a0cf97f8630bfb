"""What an engine runs for a router succeeds, fails and ends each by itself."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.support.responses import columns
from twinkle_serve.data_format import SampleColumns
from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.data_format.samples import PartialSample
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.group_runner import (
    MIN_FIRST_PERIOD_S,
    PARTIAL_UPDATES_PERIOD_S,
    UPDATES_PERIOD_S,
    Finished,
    GroupRunner,
)
from twinkle_serve.engines.stops import stop_cut
from twinkle_serve.errors import EngineDeadError, EngineError, SamplingParamsError, TwinkleServeError


class ScriptedEngine:
    """Samples what a test says: an error to raise, or None to wait until the test ends it."""

    info: EngineInfo

    def __init__(self, script: dict[int, Exception | None]) -> None:
        self.script = script
        self.running: set[int] = set()
        self.started = asyncio.Event()

    async def start(self) -> None: ...

    async def sample_group(self, group: Group) -> SampleColumns:
        if group.id not in self.script:
            return columns(group.id, ["ok"])
        if (error := self.script[group.id]) is not None:
            raise error
        self.running.add(group.id)
        self.started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.running.discard(group.id)
        raise AssertionError

    async def check_health(self) -> None: ...

    async def stop(self) -> None: ...


def groups(count: int) -> list[Group]:
    return [Group(id=i, prompt_ids=np.zeros(1, np.int32), params=DecodingParams()) for i in range(count)]


async def collect(runner: GroupRunner) -> tuple[set[int], dict[int, TwinkleServeError]]:
    """Ids of the groups that came back, and the failures by id."""
    items: list[Finished] = [item async for item in runner.results()]
    done = {int(group) for item in items if item.columns is not None for group in item.columns.group}
    return done, {key[0]: error for item in items for key, error in item.failures.items()}


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinkle_serve.engines.group_runner.LINGER_S", 0.01)


async def test_group_that_fails_fails_alone() -> None:
    """A refusal keeps its type; a bug becomes an EngineError; the neighbours come back."""
    runner = GroupRunner(ScriptedEngine({1: SamplingParamsError("no"), 2: ZeroDivisionError("oops")}).sample_group)
    runner.submit(groups(5))
    done, failures = await collect(runner)
    assert done == {0, 3, 4}
    assert isinstance(failures[1], SamplingParamsError)
    assert isinstance(failures[2], EngineError) and "oops" in str(failures[2])


async def test_part_that_fails_ends_the_others_of_its_group() -> None:
    """Nobody wants them any more."""
    engine = ScriptedEngine({0: None})
    refused = asyncio.Event()

    async def sample(part: Group) -> SampleColumns:
        if part.first_sample == 1:
            await engine.started.wait()
            refused.set()
            raise SamplingParamsError("no")
        return await engine.sample_group(part)

    runner = GroupRunner(sample)
    runner.submit([replace(groups(1)[0], count=3)])
    done, failures = await collect(runner)
    assert not done and list(failures) == [0] and refused.is_set()
    assert not engine.running and not runner.running


async def test_dead_engine_ends_the_results() -> None:
    """The others are aborted, for they are lost with it."""
    engine = ScriptedEngine({0: EngineDeadError("gone"), 1: None})
    runner = GroupRunner(engine.sample_group)
    runner.submit(groups(2))
    with pytest.raises(EngineDeadError, match="gone"):
        await collect(runner)
    await asyncio.sleep(0)
    assert not engine.running


async def test_aborted_group_comes_back_in_no_item() -> None:
    """And the results end without it."""
    engine = ScriptedEngine({0: None})
    runner = GroupRunner(engine.sample_group)
    runner.submit(groups(2))
    results = asyncio.ensure_future(collect(runner))
    await engine.started.wait()
    runner.abort([(0, 0, 0)])
    assert await results == ({1}, {})
    assert not engine.running and not runner.running


async def test_abort_that_overtakes_its_chunk_holds() -> None:
    """The group is not started; a later attempt at it is."""
    runner = GroupRunner(ScriptedEngine({}).sample_group)
    runner.abort([(0, 0, 0)])
    runner.submit(groups(2))
    assert await collect(runner) == ({1}, {})
    runner.submit(replace(group, attempts=1) for group in groups(2))
    assert await collect(runner) == ({0, 1}, {})


async def test_closing_the_results_aborts_what_runs() -> None:
    """Nothing goes on behind a router that left."""
    engine = ScriptedEngine({1: None})
    runner = GroupRunner(engine.sample_group)
    runner.submit(groups(1))
    runner.submit(groups(2)[1:])
    results = runner.results()
    await anext(results)
    await results.aclose()
    await asyncio.sleep(0)
    assert not engine.running


async def test_end_of_a_chunk_takes_along_what_waits_for_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended of a chunk that goes on waits; the last one of a chunk does not, and they share an item."""
    monkeypatch.setattr("twinkle_serve.engines.group_runner.MIN_FLUSH_S", 1000.0)
    monkeypatch.setattr("twinkle_serve.engines.group_runner.MAX_FLUSH_S", 1000.0)
    engine = ScriptedEngine({0: None})
    runner = GroupRunner(engine.sample_group)
    results = runner.results()
    runner.submit(groups(2))  # 1 ends, and has time
    first = asyncio.ensure_future(anext(results))
    await engine.started.wait()
    assert not first.done()
    runner.submit(groups(3)[2:])  # a chunk that ends
    columns = (await first).columns
    assert columns is not None and set(columns.group.tolist()) == {1, 2}
    await results.aclose()


async def test_engine_with_free_places_hands_back_at_once_what_the_router_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the router has nothing more, or the engine no place, it takes its time."""
    monkeypatch.setattr("twinkle_serve.engines.group_runner.MIN_FLUSH_S", 1000.0)
    monkeypatch.setattr("twinkle_serve.engines.group_runner.MAX_FLUSH_S", 1000.0)
    for places, more, soon in ((2, True, True), (2, False, False), (1, True, False)):
        engine = ScriptedEngine({0: None})
        runner = GroupRunner(engine.sample_group, max_num_seqs=places)
        runner.submit(groups(2), more=more)  # 1 ends, 0 does not
        results = runner.results()
        first = asyncio.ensure_future(anext(results))
        await engine.started.wait()
        done, _ = await asyncio.wait({first}, timeout=5.0 if soon else 0.1)
        assert bool(done) is soon
        first.cancel()
        await asyncio.wait({first})


class Clock:
    """Reports of a runner's running samples, by the time that its test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, groups: list[Group]) -> None:
        engine = ScriptedEngine({group.id: None for group in groups})
        self.tokens = dict.fromkeys((group.id for group in groups), 0)
        """Number of tokens that each sample has."""
        self.now = 0.0
        self.runner = GroupRunner(engine.sample_group, self._partial_output)
        monkeypatch.setattr(self.runner._loop, "time", lambda: self.now)
        self.runner.submit(groups)

    def _partial_output(self, group: Group, offset: int, sample: int) -> PartialSample | None:
        tokens = np.arange(offset, self.tokens[group.id], dtype=np.int32)
        spans = (("initial", 0),)
        partial = PartialSample(tokens=tokens, logprobs=None, logprob_tokens=None, weight_versions=spans)
        return partial if len(partial) else None

    def due_at(self) -> float:
        runner = self.runner
        return min(runner._starting.at, runner._updating.at, runner._resumable.at)

    def reported_at(self, now: float) -> list[tuple[int, int, int]]:
        """(group, offset, tokens) of each update that is reported at a time."""
        self.now = now
        updates = self.runner._partial_updates()
        return [(update.attempt[0], update.offset, len(update.partial)) for update in updates]


async def test_first_token_is_reported_at_once_and_others_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that wait for their first token are asked often, and the longer they wait the less often; those that have
    one share a report."""
    clock = Clock(monkeypatch, [replace(group, updates="decoded") for group in groups(2)])
    assert clock.due_at() == MIN_FIRST_PERIOD_S and clock.reported_at(0.002) == []
    clock.tokens[0] = 1
    assert clock.reported_at(0.004) == [(0, 0, 1)]
    clock.tokens.update({0: 3, 1: 2})
    assert clock.reported_at(0.006) == [(1, 0, 2)], "the other one is not due"
    clock.tokens.update({0: 4, 1: 5})
    assert clock.due_at() == 0.004 + UPDATES_PERIOD_S
    assert clock.reported_at(clock.due_at()) == [(0, 1, 3), (1, 2, 3)]
    assert clock.due_at() == 0.004 + 2 * UPDATES_PERIOD_S
    clock.runner.close()


async def test_many_samples_are_reported_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that reports never take more than a share of the time. Those that only may be resumed take half a second."""
    clock = Clock(monkeypatch, [replace(group, updates="decoded") for group in groups(100)])
    clock.tokens = dict.fromkeys(clock.tokens, 1)
    assert len(clock.reported_at(1.0)) == 100
    assert clock.reported_at(1.0 + UPDATES_PERIOD_S) == [] and clock.due_at() == 1.0 + UPDATES_PERIOD_S + 0.15
    clock.runner.close()
    clock = Clock(monkeypatch, [replace(group, resume=True) for group in groups(1)])
    assert clock.due_at() == PARTIAL_UPDATES_PERIOD_S
    clock.runner.close()
    clock = Clock(monkeypatch, groups(1))
    assert clock.due_at() == math.inf, "the others are never asked"
    clock.runner.close()


async def test_sample_that_waits_long_for_its_first_token_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fiftieth of the time that it has waited, up to the period of all others."""
    clock = Clock(monkeypatch, [replace(group, updates="decoded") for group in groups(1)])
    for now, period in ((0.01, 0.002), (0.5, 0.01), (60.0, UPDATES_PERIOD_S)):
        assert clock.reported_at(now) == [] and clock.due_at() == pytest.approx(now + period)
    clock.runner.close()


def test_stop_cut_is_at_the_string_that_is_complete_first() -> None:
    """As when the text comes character by character."""
    assert (
        stop_cut(
            "abcdef",
            DecodingParams(
                stop_strings=(
                    "abcd",
                    "bc",
                )
            ),
        )
        == 1
    )
    assert (
        stop_cut(
            "abcdef",
            DecodingParams(
                stop_strings=(
                    "def",
                    "cdef",
                )
            ),
        )
        == 3
    )
    assert (
        stop_cut(
            "abcdef",
            DecodingParams(
                stop_strings=(
                    "cdef",
                    "def",
                )
            ),
        )
        == 2
    )
    assert stop_cut("abcdef", DecodingParams(stop_strings=("x",))) is None
