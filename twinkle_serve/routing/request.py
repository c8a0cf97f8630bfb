"""One accepted request: its groups on the way out, its samples on the way in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.messages import MessageParser
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.routing.seeds import prompt_seed
from twinkle_serve.template.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHeader:
    """What all parts of a response share."""

    logprobs_mode: str
    parser: MessageParser


class Request:
    """Gathers the samples of one request.

    Guarantees: `prompts_as_they_finish` yields each prompt once, with exactly `num_samples` samples, or raises.
    """

    def __init__(
        self,
        first_id: int,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        header: ResponseHeader,
        adapter: AdapterVersion | None = None,
        caller: str = "",
    ) -> None:
        self.ids = range(first_id, first_id + len(prompts))
        """Group id of each prompt."""
        self._prompts = prompts
        self._params = params
        self._header = header
        self._adapter = adapter
        self.caller = caller
        self._missing = dict.fromkeys(self.ids, params.num_samples)
        """Samples still to come, by group id."""
        self.weight_versions: set[str] = set()
        """Labels of the model's own weights that have sampled for it."""
        self._arrived: asyncio.Queue[tuple[SampleColumns, list[int]] | TwinkleServeError] = asyncio.Queue()

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
                adapter=self._adapter,
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

    def add(self, columns: SampleColumns) -> None:
        """Takes samples of this request's groups, each sample once."""
        self.weight_versions.update(label for spans in set(columns.weight_versions) for label, _ in spans)
        complete = []
        for group_id in columns.group.tolist():
            self._missing[group_id] -= 1
            assert self._missing[group_id] >= 0, f"group {group_id} has more than {self._params.num_samples} samples"
            if not self._missing[group_id]:
                complete.append(group_id)
        self._arrived.put_nowait((columns, complete))

    def fail(self, error: TwinkleServeError) -> None:
        """Ends the request with an error."""
        self._arrived.put_nowait(error)

    async def arrivals(self) -> AsyncGenerator[tuple[SampleColumns, list[int]], None]:
        """Samples as they come, with the ids of the groups that they complete; ends with the last sample."""
        left = self.samples_wanted
        while left:
            arrived = await self._arrived.get()
            if isinstance(arrived, TwinkleServeError):
                raise arrived
            left -= len(arrived[0])
            yield arrived

    async def response(self) -> SampleResponse:
        """Everything, prompt-major."""
        parts = [columns async for columns, _ in self.arrivals()]
        return self._respond(parts, self.ids)

    async def prompts_as_they_finish(self) -> AsyncGenerator[SampleResponse, None]:
        """Responses over the prompts that have just become complete, one or more each."""
        pending: list[SampleColumns] = []
        async for columns, complete in self.arrivals():
            pending.append(columns)
            if complete:
                together = SampleColumns.concat(pending)
                rest = together.without(set(complete))
                pending = [rest] if len(rest) else []
                yield self._respond([together], complete)

    def _respond(self, parts: list[SampleColumns], ids: Sequence[int]) -> SampleResponse:
        order = sorted(ids)
        prompts = [self._prompts[group_id - self.ids.start] for group_id in order]
        return SampleResponse(
            columns=SampleColumns.concat(parts).regrouped({group_id: i for i, group_id in enumerate(order)}),
            prompts=[prompt.ids for prompt in prompts],
            inputs=[prompt.source for prompt in prompts],
            logprobs_mode=self._header.logprobs_mode,
            parser=self._header.parser,
            turns=tuple(prompt.turn for prompt in prompts),
            prompt_indices=tuple(prompt.index for prompt in prompts),
        )
