"""Runs groups on an engine and hands their samples back in batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cachetools import LRUCache

from twinkle_serve.data_format.groups import Attempt, Group, GroupKey
from twinkle_serve.data_format.samples import PartialSample, SampleColumns
from twinkle_serve.engines.text import TextStream
from twinkle_serve.errors import EngineDeadError, EngineError, TwinkleServeError

logger = logging.getLogger(__name__)

MAX_EARLY_ABORTS = 10_000
"""Aborts remembered for groups that have not arrived; the oldest are dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialUpdate:
    """New tokens of a running sample since the last report."""

    attempt: Attempt
    """Attempt of its group at the router."""
    sample: int
    """Index of the sample in its prompt."""
    offset: int
    """Tokens reported before."""
    partial: PartialSample
    count: int = 1
    """Number of equal samples, from this one on, that it is an update of."""
    text: str = ""
    """Text that became final with these tokens, as `Group.updates` asks for it."""
    text_offset: int = 0
    """Characters reported before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Finished samples and failed groups, of one or more chunks."""

    columns: SampleColumns | None = None
    failures: dict[GroupKey, TwinkleServeError] = field(default_factory=dict)
    """Errors of groups that failed by themselves; the others go on."""
    partial_updates: Sequence[PartialUpdate] = ()
    """New tokens of running samples."""


SampleGroup: TypeAlias = Callable[[Group], Awaitable[SampleColumns]]
"""`Engine.sample_group`, or a wrapper of it."""
PartialOutput: TypeAlias = Callable[[Group, int, int], PartialSample | None]
"""`Engine.partial_output`, or a wrapper of it."""
MakeText: TypeAlias = Callable[[Group], TextStream]
"""Creates the text of a sample that is reported while it runs, with the tokens that it continues from."""

PARTIAL_UPDATES_PERIOD_S = 0.5
"""How often new tokens of resumable samples are reported: a resumed sample loses at most this much work."""

UPDATES_PERIOD_S = 0.02
"""How often new tokens are reported of samples whose caller reads them while they run."""
UPDATE_COST_S = 0.0015
"""Least time between two reports, for each such sample: one sample's update takes about 0.2 ms of CPU in all processes
on its way together, so that reports take at most a seventh of a core per engine."""
MIN_FIRST_PERIOD_S = 0.002
FIRST_SHARE = 0.02
"""The first token of a sample is looked for after another FIRST_SHARE of the time that it has taken so far, within
MIN_FIRST_PERIOD_S and UPDATES_PERIOD_S, and is reported at once."""


def split_by_sample(group: Group) -> list[Group]:
    """Splits a group into one part per sample, so that each comes back when it ends.

    A greedy group stays whole, since its samples are equal; so does one whose prompt is scored, which happens once.
    """
    if group.params.greedy or group.params.prompt_logprobs is not None:
        return [group]
    return [group.part(sample, 1) for sample in group.samples]


MIN_FLUSH_S, MAX_FLUSH_S = 0.05, 1.0
FLUSH_SHARE = 0.02
"""A finished sample waits for others to share an item: for this share of its running time, within these limits."""

STARVING_FLUSH_S = 0.01
"""The wait where the engine has free places and the router has more groups for it."""

LINGER_S = 1.0
"""How long `results` stays open when nothing runs."""


@dataclass(slots=True, eq=False)
class _Chunk:
    """Groups that arrived together and that one call may wait for."""

    left: int = 0
    """Running parts."""


@dataclass(slots=True, eq=False)
class _Sample:
    """A running sample whose tokens are reported."""

    index: int
    """Index of the sample in its part."""
    count: int
    """Number of samples that are equal to it."""
    reported: int
    """Tokens reported so far."""
    text: TextStream | None
    """None where no text is reported."""
    characters: int = 0
    """Characters reported so far."""


@dataclass(slots=True, eq=False)
class _Part:
    """A unit of work for the engine; see `split_by_sample`."""

    chunk: _Chunk
    group: Group
    """The whole group, as the router placed it."""
    part: Group
    began_at: float
    samples: list[_Sample]
    """Those whose tokens are reported while they run."""


class _Reports:
    """Running parts that are reported together."""

    def __init__(self) -> None:
        self.parts: dict[asyncio.Task[SampleColumns], _Part] = {}
        self.at = math.inf
        """When the next report is due; never while there are no parts."""

    def add(self, task: asyncio.Task[SampleColumns], part: _Part, at: float) -> None:
        """Adds a part that is due at a time, or earlier where others are."""
        self.parts[task] = part
        self.at = min(self.at, at)

    def remove(self, task: asyncio.Task[SampleColumns]) -> None:
        """Removes a part. Ignored if it is not there."""
        if self.parts.pop(task, None) is not None and not self.parts:
            self.at = math.inf


def _no_text(tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    return ""


class GroupRunner:
    """Runs groups on an engine for one router and yields samples as they end, across chunks.

    An item costs its receiver about half a millisecond, so a sample waits for others, except the last one of a chunk.
    """

    def __init__(
        self,
        sample_group: SampleGroup,
        partial_output: PartialOutput = lambda group, offset, sample: None,
        max_num_seqs: int = 1,
        make_text: MakeText = lambda group: TextStream(_no_text, group.params),
    ) -> None:
        """Binds to the running event loop.

        Args:
            max_num_seqs: places of the engine.
        """
        self._sample_group = sample_group
        self._partial_output = partial_output
        self._make_text = make_text
        self._max_num_seqs = max_num_seqs
        self._more = False
        """Whether the router has more groups than it has sent."""
        self._loop = asyncio.get_running_loop()
        self._parts: dict[asyncio.Task[SampleColumns], _Part] = {}
        """Running parts, and ended ones that were not yielded yet."""
        self._running: dict[Attempt, list[asyncio.Task[SampleColumns]]] = {}
        self._ended: list[asyncio.Task[SampleColumns]] = []
        """In order of their end."""
        self._due = math.inf
        """When the ended parts are due."""
        self._changed = asyncio.Event()
        self._aborted_early: LRUCache[Attempt, None] = LRUCache(MAX_EARLY_ABORTS)
        self._resumable = _Reports()
        """Parts that may be resumed, and that nobody reads while they run."""
        self._updating = _Reports()
        """Parts that somebody reads while they run."""
        self._starting = _Reports()
        """Those of them of which no token was reported yet."""
        self._failure: EngineDeadError | None = None

    @property
    def running(self) -> int:
        """Number of groups that have not ended."""
        return len(self._running)

    def submit(self, groups: Iterable[Group], *, more: bool = False) -> None:
        """Starts a chunk; `more` says that other groups wait for places."""
        self._more = more
        shared, now = _Chunk(), self._loop.time()
        for group in groups:
            if group.attempt in self._aborted_early:
                del self._aborted_early[group.attempt]
                continue
            tasks = self._running[group.attempt] = []
            chunk = _Chunk() if group.alone else shared
            for part in split_by_sample(group):
                task = asyncio.ensure_future(self._sample_group(part))
                tasks.append(task)
                self._parts[task] = _Part(chunk, group, part, now, self._followed_samples(part))
                if group.updates is not None:
                    self._starting.add(task, self._parts[task], now + MIN_FIRST_PERIOD_S)
                elif group.resume:
                    self._resumable.add(task, self._parts[task], now + PARTIAL_UPDATES_PERIOD_S)
                task.add_done_callback(self._end)
            chunk.left += len(tasks)
        self._changed.set()

    def _followed_samples(self, part: Group) -> list[_Sample]:
        if not part.is_followed:
            return []
        reported = 0 if part.partial is None else len(part.partial)
        equal = part.count if part.params.greedy else 1
        return [
            _Sample(index, equal, reported, None if part.updates is None else self._make_text(part))
            for index in range(0, part.count, equal)
        ]

    def _end(self, task: asyncio.Task[SampleColumns]) -> None:
        if (part := self._parts.get(task)) is None:
            if not task.cancelled():
                task.exception()  # or asyncio would log it
            return
        part.chunk.left -= 1
        self._ended.append(task)
        now = self._loop.time()
        if not part.chunk.left:
            wait_s = 0.0
        elif self._more and len(self._parts) - len(self._ended) < self._max_num_seqs:
            wait_s = STARVING_FLUSH_S
        else:
            longest = MIN_FLUSH_S if part.group.urgent else MAX_FLUSH_S
            wait_s = min(max(MIN_FLUSH_S, FLUSH_SHARE * (now - part.began_at)), longest)
        if part.group.updates is not None:
            report_at = self._updating.at if task in self._updating.parts else now
            wait_s = max(0.0, min(wait_s, report_at - now))
        self._due = min(self._due, now + wait_s)
        self._changed.set()

    async def results(self) -> AsyncGenerator[Finished, None]:
        """Yields samples as they end, until nothing has run for LINGER_S. Takes one reader.

        Guarantees:
            Every sample is in one item, unless its group failed or was aborted; a failure is in one item.
            Partial updates of a sample come before its end, each token once.
            Closing the iterator, or cancelling its consumer, aborts all running groups.

        Raises:
            EngineDeadError: the engine is gone; samples that were not yielded are lost.
        """
        try:
            while await self._something_is_due():
                ended, self._ended, self._due = self._ended, [], math.inf
                for task in ended:
                    for reports in (self._resumable, self._updating, self._starting):
                        reports.remove(task)
                if updates := self._partial_updates():
                    yield Finished(partial_updates=updates)
                items, dead = _collect([(self._take(task).key, task) for task in ended])
                for item in items:
                    yield item
                if dead is not None:
                    raise dead
        finally:
            self.close()

    async def _something_is_due(self) -> bool:
        """Waits until something is due; returns False when nothing has run for LINGER_S."""
        idle_at = self._loop.time() + LINGER_S
        while True:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            due = min(self._due, self._resumable.at, self._updating.at, self._starting.at)
            until = due if self._parts else idle_at
            if until <= self._loop.time():
                return bool(self._parts)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until if until < math.inf else None):
                    await self._changed.wait()

    def _take(self, task: asyncio.Task[SampleColumns]) -> Group:
        """Removes an ended part. Returns its group, whose other parts are aborted if it failed."""
        group = self._parts.pop(task).group
        if not task.cancelled() and task.exception() is not None:
            self.abort([group.attempt])
        tasks = self._running[group.attempt]
        tasks.remove(task)
        if not tasks:
            del self._running[group.attempt]
        return group

    def _partial_updates(self) -> list[PartialUpdate]:
        """Returns the new tokens of running samples whose report is due."""
        now = self._loop.time()
        updates: list[PartialUpdate] = []
        if self._resumable.at <= now:
            for part in self._resumable.parts.values():
                updates += self._new_of(part)
            self._resumable.at = now + PARTIAL_UPDATES_PERIOD_S
        if self._updating.at <= now:
            for part in self._updating.parts.values():
                updates += self._new_of(part)
            self._updating.at = now + self._period_s()
        if self._starting.at <= now:
            updates += self._first_updates(now)
        return updates

    def _first_updates(self, now: float) -> list[PartialUpdate]:
        """Returns the first tokens of samples; later ones come with those of all others."""
        updates: list[PartialUpdate] = []
        newest = 0.0
        for task, part in list(self._starting.parts.items()):
            if first := self._new_of(part):
                updates += first
                self._starting.remove(task)
                self._updating.add(task, part, now + self._period_s())
            else:
                newest = max(newest, part.began_at)
        if self._starting.parts:
            share = FIRST_SHARE * (now - newest)
            self._starting.at = now + min(max(MIN_FIRST_PERIOD_S, share), UPDATES_PERIOD_S)
        return updates

    def _period_s(self) -> float:
        """Returns the time between two reports of samples that are read while they run."""
        return max(UPDATES_PERIOD_S, UPDATE_COST_S * sum(len(part.samples) for part in self._updating.parts.values()))

    def _new_of(self, part: _Part) -> list[PartialUpdate]:
        """Returns the tokens of a part that were not reported yet."""
        updates = []
        for sample in part.samples:
            partial = self._partial_output(part.part, sample.reported, sample.index)
            if partial is None:
                continue
            text = "" if sample.text is None else sample.text.push(partial.tokens.tolist())
            updates.append(
                PartialUpdate(
                    attempt=part.group.attempt,
                    sample=part.part.first_sample + sample.index,
                    offset=sample.reported,
                    partial=partial,
                    count=sample.count,
                    text=text,
                    text_offset=sample.characters,
                )
            )
            sample.reported += len(partial)
            sample.characters += len(text)
        return updates

    def abort(self, attempts: Iterable[Attempt]) -> None:
        """Aborts groups that still run. They appear in no item."""
        for attempt in attempts:
            if attempt in self._running:
                for task in self._running[attempt]:
                    task.cancel()
            else:
                # It has ended, or has not arrived: an abort may overtake its chunk.
                self._aborted_early[attempt] = None

    def fail(self, error: EngineDeadError) -> None:
        """Makes `results` raise, now or when it is called."""
        self._failure = error
        self._changed.set()

    def close(self) -> None:
        """Aborts and removes everything."""
        for task in self._parts:
            task.cancel()
        self._parts, self._running, self._ended, self._due = {}, {}, [], math.inf
        self._resumable, self._updating, self._starting = _Reports(), _Reports(), _Reports()
        self._changed.set()


def _collect(
    done: Iterable[tuple[GroupKey, asyncio.Task[SampleColumns]]],
) -> tuple[list[Finished], EngineDeadError | None]:
    """Returns one item per layout of columns, one for the failures, and the error by which the engine died, if any."""
    death: EngineDeadError | None = None
    failures: dict[GroupKey, TwinkleServeError] = {}
    by_layout: dict[tuple[int, bool, bool], list[SampleColumns]] = {}
    for key, task in done:
        if task.cancelled():
            continue
        match task.exception():
            case None:
                by_layout.setdefault(task.result().layout, []).append(task.result())
            case EngineDeadError() as dead:
                death = dead
            case TwinkleServeError() as failure:
                failures[key] = failure
            case bug:
                logger.error(f"a bug in sampling group {key}", exc_info=bug)
                failures[key] = EngineError(f"a bug in the engine: {bug!r}")
    items = [Finished(columns=SampleColumns.concat(parts)) for parts in by_layout.values()]
    return ([*items, Finished(failures=failures)] if failures else items), death
