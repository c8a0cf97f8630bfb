"""One admitted request: makes its groups and gathers its samples."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.sample_updates import CallBegun, SampleUpdate, UpdateText
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.sampling_params import DecodingParams, SamplingParams
from twinkle_serve.data_format.token_lists import TokenLists
from twinkle_serve.data_format.weights import MAIN_TRACK
from twinkle_serve.engines.group_runner import PartialUpdate
from twinkle_serve.errors import DeadlineError, RequestError, TwinkleServeError
from twinkle_serve.routing.call_updates import CallUpdates, FollowedPrompt
from twinkle_serve.routing.groups import RoutedGroup
from twinkle_serve.routing.seeds import content_seed, occurrences, prompt_seed
from twinkle_serve.template.prompts import Prompt

FEW_SAMPLES = 64
"""Sorting so many samples takes 0.1 ms, as the way to a thread and back does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHeader:
    """Fields that all parts of a response share."""

    logprobs_mode: str
    parser: MessageParser
    logprobs_are_masked: bool = False


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt and how it is sampled."""

    prompt: Prompt
    params: SamplingParams
    seed: int | None = None
    """Of its first sample."""

    @property
    def reproducible(self) -> bool:
        """Whether its samples have the same tokens when they are sampled again."""
        return self.seed is not None or self.params.temperature == 0


def plan_prompts(prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[PlannedPrompt]:
    """Gives each prompt of a call its parameters and its seed.

    Args:
        params: those of each input of the call, of which prompts may be fewer.
    """
    by_content = any(each.seed is not None and each.seed_by == "content" for each in params)
    earlier = occurrences(prompt.ids for prompt in prompts) if by_content else [0] * len(prompts)
    return [
        PlannedPrompt(prompt, params[prompt.index], _seed(prompt, params[prompt.index], occurrence))
        for prompt, occurrence in zip(prompts, earlier, strict=True)
    ]


def _seed(prompt: Prompt, params: SamplingParams, occurrence: int) -> int | None:
    if params.seed is None:
        return None
    if params.seed_by == "content":
        return content_seed(params.seed, prompt.ids, occurrence)
    return prompt_seed(params.seed, prompt.index)


class Request:
    """Gathers the samples of one request.

    Guarantees:
        - `prompts_as_they_finish` yields each prompt that was not dropped once, with exactly its number of samples,
          or raises.
    """

    def __init__(
        self,
        first_id: int,
        planned: Sequence[PlannedPrompt],
        header: ResponseHeader,
        adapter: AdapterVersion | None = None,
        *,
        inputs: Sequence[Mapping[str, Any]] | None = None,
        caller: str = "",
        sample_timeout_s: float | None = None,
        min_groups: int | None = None,
        track: str = MAIN_TRACK,
        engine: str = "",
        update_text: UpdateText | None = None,
        skip_special_tokens: bool = False,
        traceparent: str = "",
    ) -> None:
        """
        Args:
            inputs: the call's inputs, by prompt index; None leaves them out of the response.
            caller: callers take turns.
            min_groups: number of complete prompts after which the rest is dropped.
            track: the one whose engines sample it.
            engine: the only one of them that may; "": any.
            update_text: the text of updates, if new tokens are reported while samples run.
            skip_special_tokens: leave special tokens out of the text of all samples.
            traceparent: of the span that its groups are part of.
        """
        self.ids = range(first_id, first_id + len(planned))
        """Group ids of the prompts, in order."""
        self.caller = caller
        self.track = track
        self._planned = planned
        self._prompts = [each.prompt for each in planned]
        self._inputs = inputs
        self._header = header
        self.adapter = adapter
        self._sample_timeout_s = sample_timeout_s
        self._engine = engine
        self._update_text = update_text
        self._skip_special_tokens = skip_special_tokens
        self._traceparent = traceparent
        self._missing = {i: each.params.num_samples for i, each in zip(self.ids, planned, strict=True)}
        """Number of missing samples by group id; dropped groups are left out."""
        self.samples_wanted = sum(self._missing.values())
        self._to_complete = len(planned) if min_groups is None else min_groups
        self._complete: set[int] = set()
        """Group ids of complete prompts."""
        self.weight_versions: set[str] = set()
        """Labels of the model weights that have sampled for it."""
        self._updates: CallUpdates | None = None
        if update_text is not None:
            followed = {
                i: FollowedPrompt(each.prompt.index, each.reproducible)
                for i, each in zip(self.ids, planned, strict=True)
            }
            self._updates = CallUpdates(update_text, followed)
        self.admitted_at = 0.0
        """By the event loop's clock."""
        self.tokens_done = 0
        """Tokens of samples that have arrived."""
        self.has_tokens = False
        """Whether an update of it has come."""
        self._arrived: asyncio.Queue[tuple[SampleColumns, list[int]] | TwinkleServeError | None] = asyncio.Queue()
        """Finished samples, with the groups that they complete, and errors. None: look at the updates and at what is
        still missing."""

    def groups(self) -> list[RoutedGroup]:
        """Makes one group per prompt."""
        decoding = {id(each.params): self._decoding(each.params) for each in self._planned}
        return [
            RoutedGroup(
                id=group_id,
                prompt_ids=each.prompt.ids,
                params=decoding[id(each.params)],
                count=each.params.num_samples,
                seed=each.seed,
                adapter=self.adapter,
                sample_timeout_s=self._sample_timeout_s,
                urgent=self._to_complete < len(self._prompts),
                alone=len(self._prompts) == 1,
                input=each.prompt.index,
                caller=self.caller,
                priority=each.params.priority,
                track=self.track,
                engine=self._engine,
                updates=self._update_text,
                traceparent=self._traceparent,
            )
            for group_id, each in zip(self.ids, self._planned, strict=True)
        ]

    def _decoding(self, params: SamplingParams) -> DecodingParams:
        decoding = DecodingParams.of(params)
        return replace(decoding, skip_special_tokens=True) if self._skip_special_tokens else decoding

    def begun(self) -> CallBegun:
        """Returns the facts that its reader needs before the first token."""
        return CallBegun(
            prompt_indices=tuple(prompt.index for prompt in self._prompts),
            prompts=TokenLists.of([prompt.ids for prompt in self._prompts]),
            num_samples=tuple(each.params.num_samples for each in self._planned),
            reproducible=tuple(each.reproducible for each in self._planned),
            adapter="" if self.adapter is None else self.adapter.label,
            logprobs_mode=self._header.logprobs_mode,
            logprobs_are_masked=self._header.logprobs_are_masked,
            parser=self._header.parser,
            turns=tuple(prompt.turn for prompt in self._prompts),
        )

    @property
    def is_read(self) -> bool:
        """Whether new tokens of its samples are reported while they run."""
        return self._updates is not None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum([len(prompt.ids) for prompt in self._prompts])

    @property
    def samples_missing(self) -> int:
        return sum(self._missing.values())

    @property
    def complete(self) -> bool:
        """Whether every prompt has all its samples, and none was dropped."""
        return len(self._complete) == len(self._prompts)

    @property
    def settled(self) -> bool:
        """Whether nothing more arrives: every prompt is complete or was dropped."""
        return not self._missing

    def add(self, columns: SampleColumns) -> list[int]:
        """Adds samples of this request's groups, each sample once. Returns ids of groups that are no longer needed.

        Raises:
            EngineDeadError: a sample differs from its updates that were read.
        """
        if self._updates is not None:
            self._updates.finish(columns)
        self.weight_versions.update(label for spans in set(columns.weight_versions) for label, _ in spans)
        self.tokens_done += len(columns.tokens)
        complete = []
        for group_id in columns.group.tolist():
            assert group_id in self._missing, self._too_many(group_id)
            self._missing[group_id] -= 1
            if not self._missing[group_id]:
                del self._missing[group_id]
                complete.append(group_id)
        self._complete.update(complete)
        self._arrived.put_nowait((columns, complete))
        return list(self._missing) if len(self._complete) >= self._to_complete else []

    def add_update(self, update: PartialUpdate) -> None:
        """Adds new tokens of a running sample.

        Raises:
            EngineDeadError: it differs from its updates that were read.
        """
        if self._updates is not None:
            nothing_waited = not self._updates
            self._updates.add(update)
            if nothing_waited:
                self._arrived.put_nowait(None)

    def restart(self, group: RoutedGroup) -> None:
        """Prepares for a group whose samples start anew.

        Raises:
            EngineDeadError: one of them cannot be the same again, and its first updates were read.
        """
        if self._updates is not None:
            self._updates.restart(group.id, group.samples)

    def _too_many(self, group_id: int) -> str:
        return f"group {group_id} has more than {self._planned[group_id - self.ids.start].params.num_samples} samples"

    def drop(self, group_ids: Iterable[int]) -> list[int]:
        """Drops groups; their samples must not be added afterwards. Returns ids of those that were incomplete."""
        dropped = [group_id for group_id in group_ids if self._missing.pop(group_id, None) is not None]
        if self._updates is not None:
            self._updates.drop(dropped)
        self._arrived.put_nowait(None)
        return dropped

    def ids_of(self, inputs: Iterable[int]) -> list[int]:
        """Group ids of prompts, by their indices in the call; unknown indices are ignored."""
        wanted = set(inputs)
        return [group_id for group_id, prompt in zip(self.ids, self._prompts, strict=True) if prompt.index in wanted]

    def fail(self, error: TwinkleServeError) -> None:
        """Fails the request."""
        self._arrived.put_nowait(error)

    async def arrivals(self) -> AsyncGenerator[tuple[SampleColumns, list[int]], None]:
        """Yields samples as they arrive, with the ids of the groups they complete, until none is missing."""
        async with aclosing(self._updates_and_arrivals()) as items:
            async for item in items:
                if isinstance(item, tuple):
                    yield item

    async def _updates_and_arrivals(self) -> AsyncGenerator[list[SampleUpdate] | tuple[SampleColumns, list[int]], None]:
        """As `arrivals`, with the updates of samples as they come, before the samples themselves."""
        while not (self.settled and self._arrived.empty()):
            arrived = await self._arrived.get()
            if self._updates:
                yield self._updates.take()
            if isinstance(arrived, TwinkleServeError):
                raise arrived
            if arrived is not None:
                yield arrived

    async def response(self) -> SampleResponse:
        """Waits for every prompt that is not dropped; the response is in order of prompts.

        Raises:
            RequestError: every prompt was dropped.
            DeadlineError: with the response to the prompts that were complete.
        """
        parts: list[SampleColumns] = []
        late: str | None = None
        try:
            async for columns, _ in self.arrivals():
                parts.append(columns)
        except DeadlineError as error:
            late = str(error)  # the error itself may fail other requests too
        if late is not None:
            raise DeadlineError(late, await self._ordered(parts) if self._complete else None)
        if not self._complete:
            raise RequestError("every prompt of the call was cancelled.")
        return await self._ordered(parts)

    async def _ordered(self, parts: list[SampleColumns]) -> SampleResponse:
        """Returns the response to the complete prompts, in their order."""
        if self.samples_wanted <= FEW_SAMPLES:
            return self._respond(parts, sorted(self._complete))
        # Sorting the samples of 10,000 prompts would block the event loop for others.
        return await asyncio.to_thread(self._respond, parts, sorted(self._complete))

    async def prompts_as_they_finish(self) -> AsyncGenerator[SampleResponse, None]:
        """Yields responses over one or more prompts that have just become complete."""
        async with aclosing(self.updates_and_prompts()) as items:
            async for item in items:
                if isinstance(item, SampleResponse):
                    yield item

    async def updates_and_prompts(self) -> AsyncGenerator[list[SampleUpdate] | SampleResponse, None]:
        """As `prompts_as_they_finish`, with the updates of samples as they come, at most one of each in an item."""
        pending: list[tuple[set[int], SampleColumns]] = []
        """Samples that have arrived and not been yielded, with the ids of their groups."""
        async with aclosing(self._updates_and_arrivals()) as items:
            async for item in items:
                if isinstance(item, list):
                    yield item
                    continue
                columns, complete = item
                pending.append((set(columns.group.tolist()), columns))
                if complete:
                    done = set(complete)
                    # Other parts stay as they are: they may be large, and pending for long.
                    parts = [part for groups, part in pending if groups & done]
                    pending = [
                        (groups - done, part.without(done) if groups & done else part)
                        for groups, part in pending
                        if groups - done
                    ]
                    yield self._respond(parts, complete)

    def _respond(self, parts: list[SampleColumns], ids: Sequence[int]) -> SampleResponse:
        order = sorted(ids)
        prompts = [self._prompts[group_id - self.ids.start] for group_id in order]
        return SampleResponse(
            columns=SampleColumns.concat(parts).regrouped({group_id: i for i, group_id in enumerate(order)}),
            prompts=[prompt.ids for prompt in prompts],
            inputs=[] if self._inputs is None else [dict(self._inputs[prompt.index]) for prompt in prompts],
            logprobs_mode=self._header.logprobs_mode,
            logprobs_are_masked=self._header.logprobs_are_masked,
            parser=self._header.parser,
            turns=tuple(prompt.turn for prompt in prompts),
            prompt_indices=tuple(prompt.index for prompt in prompts),
        )
