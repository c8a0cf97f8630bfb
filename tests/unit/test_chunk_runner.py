"""A chunk's groups succeed, fail and end each by itself."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.test_response import columns
from twinkle_serve.data_format import SampleColumns, SamplingParams
from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.engines.base import ChunkRunner, Finished, stop_cut
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
    return [Group(id=i, prompt_ids=np.zeros(1, np.int32), params=SamplingParams()) for i in range(count)]


async def collect(runner: ChunkRunner, chunk: list[Group]) -> tuple[set[int], dict[int, TwinkleServeError]]:
    """Ids of the groups that came back, and the failures by id."""
    items: list[Finished] = [item async for item in runner.run(chunk)]
    done = {int(group) for item in items if item.columns is not None for group in item.columns.group}
    return done, {key[0]: error for item in items for key, error in item.failures.items()}


async def test_group_that_fails_fails_alone() -> None:
    """A refusal keeps its type; a bug becomes an EngineError; the neighbours come back."""
    engine = ScriptedEngine({1: SamplingParamsError("no"), 2: ZeroDivisionError("oops")})
    done, failures = await collect(ChunkRunner(engine.sample_group), groups(5))
    assert done == {0, 3, 4}
    assert isinstance(failures[1], SamplingParamsError)
    assert isinstance(failures[2], EngineError) and "oops" in str(failures[2])


async def test_dead_engine_ends_the_chunk() -> None:
    """The others are aborted, for they are lost with it."""
    engine = ScriptedEngine({0: EngineDeadError("gone"), 1: None})
    with pytest.raises(EngineDeadError, match="gone"):
        await collect(ChunkRunner(engine.sample_group), groups(2))
    assert not engine.running


async def test_aborted_group_comes_back_in_no_item() -> None:
    """And the chunk ends without it."""
    engine = ScriptedEngine({0: None})
    runner = ChunkRunner(engine.sample_group)
    chunk = asyncio.ensure_future(collect(runner, groups(2)))
    await engine.started.wait()
    runner.abort([(0, 0, 0)])
    assert await chunk == ({1}, {})
    assert not engine.running


async def test_abort_that_overtakes_its_chunk_holds() -> None:
    """The group is not started; a later attempt at it is."""
    runner = ChunkRunner(ScriptedEngine({}).sample_group)
    runner.abort([(0, 0, 0)])
    assert await collect(runner, groups(2)) == ({1}, {})
    assert await collect(runner, [replace(group, attempts=1) for group in groups(2)]) == ({0, 1}, {})


async def test_closing_the_iterator_aborts_what_runs() -> None:
    """Nothing goes on behind a consumer that left."""
    engine = ScriptedEngine({1: None})
    items = ChunkRunner(engine.sample_group).run(groups(2))
    await anext(items)
    await items.aclose()  # type: ignore[attr-defined]
    assert not engine.running


def test_stop_cut_is_at_the_string_that_is_complete_first() -> None:
    """As when the text comes character by character."""
    assert stop_cut("abcdef", ["abcd", "bc"]) == 1
    assert stop_cut("abcdef", ["def", "cdef"]) == 3
    assert stop_cut("abcdef", ["cdef", "def"]) == 2
    assert stop_cut("abcdef", ["x"]) is None
