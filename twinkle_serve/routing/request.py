"""One accepted request: its groups on the way out, its samples on the way in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.errors import RequestError, TwinkleServeError
from twinkle_serve.routing.seeds import prompt_seed
from twinkle_serve.template.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHeader:
    """What all parts of a response share."""

    logprobs_mode: str
    parser: MessageParser


class Request:
    """Gathers the samples of one request.

    Guarantees: `prompts_as_they_finish` yields each prompt that was not dropped once, with exactly `num_samples`
        samples, or raises.
    """

    def __init__(
        self,
        first_id: int,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        header: ResponseHeader,
        adapter: AdapterVersion | None = None,
        *,
        inputs: Sequence[Mapping[str, Any]] | None = None,
        caller: str = "",
        sample_timeout_s: float | None = None,
        min_groups: int | None = None,
    ) -> None:
        """
        Args:
            inputs: of the call, by the prompts' indices; None if the response is not to have them.
            caller: whose it is, for taking turns.
            min_groups: how many prompts are to be complete; the rest is dropped then.
        """
        self.ids = range(first_id, first_id + len(prompts))
        """Group id of each prompt."""
        self.caller = caller
        self._prompts = prompts
        self._inputs = inputs
        self._params = params
        self._header = header
        self.adapter = adapter
        self._sample_timeout_s = sample_timeout_s
        self._missing = dict.fromkeys(self.ids, params.num_samples)
        """Samples still to come, by group id; those of dropped groups are not in it."""
        self._to_complete = len(prompts) if min_groups is None else min_groups
        self._complete: set[int] = set()
        """Group ids of the prompts that have all their samples."""
        self.weight_versions: set[str] = set()
        """Labels of the model's own weights that have sampled for it."""
        self._arrived: asyncio.Queue[tuple[SampleColumns, list[int]] | TwinkleServeError | None] = asyncio.Queue()

    def groups(self) -> list[Group]:
        """What is to be placed: one group a prompt."""
        seed = self._params.seed
        return [
            Group(
                id=group_id,
                prompt_ids=prompt.ids,
                params=self._params,
                count=self._params.num_samples,
                seed=None if seed is None else prompt_seed(seed, prompt.index),
                adapter=self.adapter,
                sample_timeout_s=self._sample_timeout_s,
                urgent=self._to_complete < len(self._prompts),
                index=index,
                prompts=len(self._prompts),
                input=prompt.index,
                caller=self.caller,
            )
            for index, (group_id, prompt) in enumerate(zip(self.ids, self._prompts, strict=True))
        ]

    @property
    def samples_missing(self) -> int:
        return sum(self._missing.values())

    @property
    def samples_wanted(self) -> int:
        return len(self._prompts) * self._params.num_samples

    @property
    def complete(self) -> bool:
        """Whether every prompt has all its samples."""
        return len(self._complete) == len(self._prompts)

    @property
    def settled(self) -> bool:
        """Whether nothing is to come any more."""
        return not self._missing

    def add(self, columns: SampleColumns) -> list[int]:
        """Takes samples of this request's groups, each sample once. Returns groups that are not needed any more."""
        self.weight_versions.update(label for spans in set(columns.weight_versions) for label, _ in spans)
        complete = []
        for group_id in columns.group.tolist():
            assert group_id in self._missing, f"group {group_id} has more than {self._params.num_samples} samples"
            self._missing[group_id] -= 1
            if not self._missing[group_id]:
                del self._missing[group_id]
                complete.append(group_id)
        self._complete.update(complete)
        self._arrived.put_nowait((columns, complete))
        return list(self._missing) if len(self._complete) >= self._to_complete else []

    def drop(self, group_ids: Iterable[int]) -> list[int]:
        """Waits no longer for groups. Returns those that were not complete; no sample of them may be added any more."""
        dropped = [group_id for group_id in group_ids if self._missing.pop(group_id, None) is not None]
        self._arrived.put_nowait(None)
        return dropped

    def ids_of(self, inputs: Iterable[int]) -> list[int]:
        """Group ids of prompts by their indices in the call; those that it does not have are passed over."""
        wanted = set(inputs)
        return [group_id for group_id, prompt in zip(self.ids, self._prompts, strict=True) if prompt.index in wanted]

    def fail(self, error: TwinkleServeError) -> None:
        """Ends the request with an error."""
        self._arrived.put_nowait(error)

    async def arrivals(self) -> AsyncGenerator[tuple[SampleColumns, list[int]], None]:
        """Samples as they come, with the ids of the groups that they complete; ends when nothing is to come."""
        while not (self.settled and self._arrived.empty()):
            arrived = await self._arrived.get()
            if isinstance(arrived, TwinkleServeError):
                raise arrived
            if arrived is not None:
                yield arrived

    async def response(self) -> SampleResponse:
        """Every prompt that was not dropped, prompt-major.

        Raises:
            RequestError: all were dropped.
        """
        parts = [columns async for columns, _ in self.arrivals()]
        if not self._complete:
            raise RequestError("every prompt of the call was cancelled.")
        # Sorting what 10,000 prompts brought takes long enough to keep others waiting.
        return await asyncio.to_thread(self._respond, parts, sorted(self._complete))

    async def prompts_as_they_finish(self) -> AsyncGenerator[SampleResponse, None]:
        """Responses over the prompts that have just become complete, one or more each."""
        pending: list[tuple[set[int], SampleColumns]] = []
        """What has arrived and not been yielded, each with the groups that it is of."""
        async for columns, complete in self.arrivals():
            pending.append((set(columns.group.tolist()), columns))
            if complete:
                ended = set(complete)
                # Only what has a part in these: others may be long, and wait for long.
                parts = [part for groups, part in pending if groups & ended]
                pending = [
                    (groups - ended, part.without(ended) if groups & ended else part)
                    for groups, part in pending
                    if groups - ended
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
            parser=self._header.parser,
            turns=tuple(prompt.turn for prompt in prompts),
            prompt_indices=tuple(prompt.index for prompt in prompts),
        )
