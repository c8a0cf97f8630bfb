"""What an engine is. vllm, torch and fake implement it and pass one conformance suite."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from twinkle_serve.checkpoint import Bucket
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group, GroupKey
from twinkle_serve.data_format.samples import (
    NO_SEED,
    STOP_REASONS,
    FloatArray,
    PartialSample,
    PromptScores,
    SampleColumns,
    StopReason,
)
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.data_format.weights import PauseMode, Spans
from twinkle_serve.errors import (
    EngineArgsError,
    EngineDeadError,
    EngineError,
    PromptError,
    SamplingParamsError,
    TwinkleServeError,
    unknown_name,
)

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """Tokens that a streamed sample has gained."""

    tokens: Sequence[int]
    stop_reason: StopReason | None = None
    """Of the last item; None in those before."""
    by_stop_string: bool = False
    """Of the last item: whether a stop string ended the sample, and so cuts its text. An end-of-sequence token whose
    text is a stop string does not."""


class Engine(Protocol):
    """Samples groups of one model.

    Guarantees: a group comes back whole, `count` samples in order, or the call raises.
    Guarantees: cancelling the call aborts the group; the engine goes on with the others.
    Guarantees: with a seed, a sample does not depend on what else is in the batch.
    Guarantees: a group with an adapter is sampled by that version's weights, or the call raises.
    Guarantees: a sample that has run for `sample_timeout_s` ends where it is, with stop_reason abort.
    Does not guarantee: the order in which groups finish.
    """

    info: EngineInfo
    """Set by `start`."""

    async def start(self) -> None:
        """Loads the model. Raises EngineArgsError, ModelNotFoundError or EngineStartError."""

    async def sample_group(self, group: Group) -> SampleColumns:
        """Samples one group. Raises RequestError for what this engine cannot do, EngineDeadError if it is gone."""

    def partial_output(self, group: Group, offset: int) -> PartialSample | None:
        """What a running group of one sample, with `resume` set, has got beyond its first `offset` tokens.

        Guarantees: a sample that has ended has nothing; so the last token is none that ends it.
        May always be None: then a sample whose engine ends is sampled from its start.
        """

    def stream_tokens(self, group: Group) -> AsyncGenerator[TokenDelta, None]:
        """Samples a group of one sample, handing out its tokens as they come; the last item has a stop reason.

        Raises as `sample_group`. Closing the iterator aborts the sample.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special tokens kept."""

    async def load_adapter(self, version: AdapterVersion, files: AdapterFiles) -> None:
        """Loads an adapter version beside those that are loaded.

        Raises:
            AdapterError: LoRA is off, its rank is too large, or a module of it is not in the model. Nothing is loaded.
        """

    async def drop_adapter(self, version: AdapterVersion) -> None:
        """Frees an adapter version that no group uses."""

    async def pause(self, mode: PauseMode) -> None:
        """Has nothing sampled until `resume`, and returns when nothing is being. Again: changes the mode.

        What is asked for meanwhile waits. With `abort`, samples that have no token yet are not aborted, and wait too.
        """

    async def resume(self) -> None:
        """Ends a pause."""

    async def load_weights(self, label: str, buckets: AsyncIterable[Bucket]) -> str:
        """Loads other weights of its own, all that its checkpoint names. It must be paused.

        What it has kept of the old ones goes: the prefix cache, and what running samples have computed. Adapters stay
        loaded. If it raises, the engine holds weights of no version until another load succeeds.

        Args:
            label: what samples are stamped with from now on.

        Returns:
            A checksum of the weights as they are now, the same on every engine of the same kind and arguments.

        Raises:
            WeightsError: the engine does not take them.
            EngineDeadError: it is gone.
        """

    async def reset_prefix_cache(self) -> None:
        """Forgets the keys and values of earlier prompts, where it keeps any."""

    async def sleep(self, level: int) -> None:
        """Frees the device's memory: 1 keeps the weights in host memory, 2 drops them. Nothing may be running.

        Raises:
            UnsupportedError: this engine, on this device, cannot.
        """

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        """Ends `sleep`. `tags` of "weights" and "kv_cache" wake these alone; None wakes everything."""

    def progress(self) -> int:
        """Another number whenever it has sampled something."""

    async def check_health(self) -> None:
        """Raises EngineDeadError if it cannot sample any more."""

    async def stop(self) -> None:
        """Frees what it holds. Nothing may be called afterwards."""


def columns_of_group(
    group: Group,
    engine: str,
    tokens: Sequence[Sequence[int] | NDArray[np.int32]],
    decoded: list[str],
    stop_reasons: Iterable[StopReason],
    logprobs: FloatArray | None,
    logprob_tokens: NDArray[np.int32] | None,
    scores: PromptScores | None,
    weight_versions: Sequence[Spans],
) -> SampleColumns:
    """One finished group as columns. `tokens` holds `group.count` sequences; the rest as in SampleColumns."""
    assert len(tokens) == len(decoded) == group.count, (len(tokens), len(decoded), group.count)
    seeds = [group.seed_of(j) for j in range(group.count)]
    return SampleColumns(
        group=np.full(group.count, group.id, np.int64),
        sample=np.arange(group.first_sample, group.first_sample + group.count, dtype=np.int32),
        lengths=np.array([len(row) for row in tokens], np.int32),
        tokens=np.concatenate([np.asarray(row, np.int32) for row in tokens]),
        logprobs=logprobs,
        logprob_tokens=logprob_tokens,
        stop_reason=np.array([STOP_REASONS.index(reason) for reason in stop_reasons], np.uint8),
        decoded=decoded,
        seed=np.array([NO_SEED if seed is None else seed for seed in seeds], np.int64),
        engine=[engine] * group.count,
        adapter=["" if group.adapter is None else group.adapter.label] * group.count,
        weight_versions=list(weight_versions),
        scores={} if scores is None else {group.id: scores},
    )


def check_fits(info: EngineInfo, prompt_ids: NDArray[np.int32], params: SamplingParams, where: str = "prompt") -> None:
    """Refuses what the engine could not sample, with the numbers.

    Raises:
        PromptError: empty, too long for the context, or ids outside the vocabulary.
        SamplingParamsError: more top logprobs than the engine returns.
    """
    length = len(prompt_ids)
    if not length:
        raise PromptError(f"{where} is empty. Give it at least one token.")
    room = 0 if params.max_tokens == 0 and info.scores_full_context else 1
    if length > info.max_model_len - room:
        raise PromptError(
            f"{where} has {length} tokens, the context holds {info.max_model_len}"
            f"{', one of them for a sampled token' if room else ''}. "
            "Shorten it, or raise engine_args.max_model_len."
        )
    low, high = int(prompt_ids.min()), int(prompt_ids.max())
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise PromptError(
            f"{where} holds token id {bad}, the model's vocabulary is 0 to {info.vocab_size - 1}. "
            "Tokenise it with this model's tokenizer."
        )
    for name, k in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if k is not None and k > info.max_logprobs:
            raise SamplingParamsError(
                f"{name}={k}, the engine returns at most {info.max_logprobs}. "
                "Lower it, or raise engine_args.max_logprobs."
            )


Args = TypeVar("Args", bound=BaseModel)


def parse_engine_args(model: type[Args], kind: str, engine_args: Mapping[str, Any]) -> Args:
    """`engine_args` as the model of an engine's arguments.

    Raises:
        EngineArgsError
    """
    for name in engine_args:
        if name not in model.model_fields:
            raise EngineArgsError(unknown_name(f"{kind} engine argument", name, model.model_fields) + ".")
    try:
        return model(**engine_args)
    except ValidationError as error:
        first = error.errors()[0]
        raise EngineArgsError(f"engine_args.{first['loc'][0]}={first['input']!r}: {first['msg']}.") from None


def stop_cut(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the text is to be cut: before the stop string that is complete first, as in vLLM; None if there is none.

    Of two that are complete at the same character, the one that is named first counts.
    """
    found = [(at + len(stop), i, at) for i, stop in enumerate(stop_strings) if (at := text.find(stop)) >= 0]
    return min(found)[2] if found else None


def most_new_tokens(info: EngineInfo, group: Group) -> int:
    """Tokens that each sample of the group may have: max_tokens, or less where the context ends first."""
    room = info.max_model_len - len(group.prompt_ids)
    return room if group.params.max_tokens is None else min(group.params.max_tokens, room)


def spans_from(spans: Sequence[tuple[str, int]], offset: int) -> Spans:
    """Spans of a sample as those of its tokens from `offset` on."""
    later = [(label, start - offset) for label, start in spans if start > offset]
    before = [(label, 0) for label, start in spans if start <= offset]
    return (*before[-1:], *later)


MAX_EARLY_ABORTS = 10_000
"""Aborts remembered of groups that do not run; the oldest are forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialUpdate:
    """What a running sample has gained since the last time."""

    attempt: Attempt
    """Of its group, as the router has placed it."""
    sample: int
    """Index of the sample among its prompt's."""
    offset: int
    """Tokens that it had before."""
    partial: PartialSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Groups of a chunk that are done."""

    columns: SampleColumns | None = None
    failures: dict[GroupKey, TwinkleServeError] = field(default_factory=dict)
    """Groups that failed by themselves; the others of the chunk go on."""
    gains: Sequence[PartialUpdate] = ()
    """Of samples that are not done, of this chunk or another one."""


SampleGroup: TypeAlias = Callable[[Group], Awaitable[SampleColumns]]
"""`Engine.sample_group`, or what stands in front of it."""
PartialOutput: TypeAlias = Callable[[Group, int], PartialSample | None]
"""`Engine.partial_output`, or what stands in front of it."""

GAINS_PERIOD_S = 0.5
"""How often what running samples have gained is handed on: the most that a sample which is resumed has lost."""


def split_by_sample(group: Group) -> list[Group]:
    """A group as the parts that are handed to an engine: its samples one by one, so that each comes back when it ends.

    A greedy group stays whole, for its samples are all the same; and one whose prompt is scored: that is done once.
    """
    if group.params.greedy or group.params.prompt_logprobs is not None:
        return [group]
    return [group.part(sample, 1) for sample in group.samples]


MIN_FLUSH_S, MAX_FLUSH_S = 0.05, 1.0
FLUSH_SHARE = 0.02
"""A sample that has ended waits for others to go with: for this share of the time that it was here, within these."""

STARVING_FLUSH_S = 0.01
"""For so long where the engine has free places, and the router has more for it."""

LINGER_S = 1.0
"""How long results are waited for when nothing runs."""


@dataclass(slots=True, eq=False)
class _Chunk:
    """Groups that came together."""

    left: int = 0
    """Parts of them that run."""


@dataclass(slots=True, eq=False)
class _Part:
    """What is handed to the engine by itself; see `split_by_sample`."""

    chunk: _Chunk
    group: Group
    """What it is a part of, as the router has placed it."""
    part: Group
    began_at: float
    reported: int
    """Tokens of it that were handed on, where it may be resumed."""


class GroupRunner:
    """Runs groups on an engine for one router, and hands back samples as they end, whichever chunk they came in.

    An item costs its receiver half a millisecond or so, so a sample waits for company, but the last one of a chunk.
    """

    def __init__(
        self,
        sample_group: SampleGroup,
        partial_output: PartialOutput = lambda group, offset: None,
        max_num_seqs: int = 1,
    ) -> None:
        """Must be called on the event loop that it is to live on.

        Args:
            max_num_seqs: places of the engine.
        """
        self._sample_group = sample_group
        self._partial_output = partial_output
        self._max_num_seqs = max_num_seqs
        self._more = False
        """Whether the router had more than it has sent."""
        self._loop = asyncio.get_running_loop()
        self._parts: dict[asyncio.Task[SampleColumns], _Part] = {}
        """That run, or have ended and are yet to be handed back."""
        self._running: dict[Attempt, list[asyncio.Task[SampleColumns]]] = {}
        self._ended: list[asyncio.Task[SampleColumns]] = []
        """In the order in which they did."""
        self._due = math.inf
        """When these are to be handed back."""
        self._changed = asyncio.Event()
        self._aborted_early: dict[Attempt, None] = {}
        self._resumable: dict[asyncio.Task[SampleColumns], _Part] = {}
        self._tell_at = 0.0

    @property
    def running(self) -> int:
        """Groups that are not over."""
        return len(self._running)

    def submit(self, groups: Iterable[Group], *, more: bool = False) -> None:
        """Begins a chunk; `more` says that others wait for places."""
        self._more = more
        chunk, now = _Chunk(), self._loop.time()
        for group in groups:
            if group.attempt in self._aborted_early:
                del self._aborted_early[group.attempt]
                continue
            tasks = self._running[group.attempt] = []
            for part in split_by_sample(group):
                task = asyncio.ensure_future(self._sample_group(part))
                tasks.append(task)
                reported = 0 if part.partial is None else len(part.partial)
                self._parts[task] = _Part(chunk, group, part, now, reported)
                if group.resume:
                    self._resumable[task] = self._parts[task]
                task.add_done_callback(self._end)
            chunk.left += len(tasks)
        self._changed.set()

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
        self._due = min(self._due, now + wait_s)
        self._changed.set()

    async def results(self) -> AsyncGenerator[Finished, None]:
        """What has ended, and ends, until nothing has run for LINGER_S. It has one reader.

        Guarantees: every sample is in one item, unless its group failed or was aborted; a failure is in one item.
        Guarantees: gains of a sample come before its end, each token once.
        Guarantees: closing the iterator, or cancelling its consumer, aborts what is still running.

        Raises:
            EngineDeadError: the engine is gone; samples not yet handed back are lost.
        """
        try:
            while await self._something_is_due():
                ended, self._ended, self._due = self._ended, [], math.inf
                for task in ended:
                    self._resumable.pop(task, None)
                if gains := self._gains():
                    yield Finished(gains=gains)
                items, dead = _collect([(self._take(task).key, task) for task in ended])
                for item in items:
                    yield item
                if dead is not None:
                    raise dead
        finally:
            self.close()

    async def _something_is_due(self) -> bool:
        """Waits for something to hand back; false when nothing has run for long."""
        idle_at = self._loop.time() + LINGER_S
        while True:
            self._changed.clear()
            due = self._due
            if self._resumable:
                due = min(due, self._tell_at)
            until = due if self._parts else idle_at
            if until <= self._loop.time():
                return bool(self._parts)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until if until < math.inf else None):
                    await self._changed.wait()

    def _take(self, task: asyncio.Task[SampleColumns]) -> Group:
        """Forgets a part that has ended. Returns its group, whose other parts are aborted if it failed."""
        group = self._parts.pop(task).group
        if not task.cancelled() and task.exception() is not None:
            self.abort([group.attempt])
        tasks = self._running[group.attempt]
        tasks.remove(task)
        if not tasks:
            del self._running[group.attempt]
        return group

    def _gains(self) -> list[PartialUpdate]:
        """What running samples have gained, where it is time to hand that on."""
        now = self._loop.time()
        if not self._resumable or now < self._tell_at:
            return []
        self._tell_at = now + GAINS_PERIOD_S
        gains = []
        for resumable in self._resumable.values():
            part, offset = resumable.part, resumable.reported
            if (partial := self._partial_output(part, offset)) is not None:
                gains.append(
                    PartialUpdate(
                        attempt=resumable.group.attempt, sample=part.first_sample, offset=offset, partial=partial
                    )
                )
                resumable.reported += len(partial)
        return gains

    def abort(self, attempts: Iterable[Attempt]) -> None:
        """Aborts groups, if they still run. They come back in no item."""
        for attempt in attempts:
            if attempt in self._running:
                for task in self._running[attempt]:
                    task.cancel()
            else:
                # Done already, or not here yet: an abort may overtake the chunk.
                self._aborted_early[attempt] = None
        while len(self._aborted_early) > MAX_EARLY_ABORTS:
            del self._aborted_early[next(iter(self._aborted_early))]

    def close(self) -> None:
        """Aborts everything, and forgets it."""
        for task in self._parts:
            task.cancel()
        self._parts, self._running, self._resumable, self._ended, self._due = {}, {}, {}, [], math.inf
        self._changed.set()


def _collect(
    done: Iterable[tuple[GroupKey, asyncio.Task[SampleColumns]]],
) -> tuple[list[Finished], EngineDeadError | None]:
    """One item for each width of logprobs, and one for the failures; and the engine's death, if one died of it."""
    death: EngineDeadError | None = None
    failures: dict[GroupKey, TwinkleServeError] = {}
    by_width: dict[int, list[SampleColumns]] = {}
    for key, task in done:
        if task.cancelled():
            continue
        match task.exception():
            case None:
                by_width.setdefault(task.result().logprobs_width, []).append(task.result())
            case EngineDeadError() as dead:
                death = dead
            case TwinkleServeError() as failure:
                failures[key] = failure
            case bug:
                logger.error(f"a bug in sampling group {key}", exc_info=bug)
                failures[key] = EngineError(f"a bug in the engine: {bug!r}")
    items = [Finished(columns=SampleColumns.concat(parts)) for parts in by_width.values()]
    return ([*items, Finished(failures=failures)] if failures else items), death
