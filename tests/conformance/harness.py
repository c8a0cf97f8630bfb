"""An engine under test, with the bookkeeping that tests would repeat."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinkle_serve.adapters import describe_adapter
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import Group, TextDelta
from twinkle_serve.data_format.response import SampledSequence, SampleResponse
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.engines.base import Engine
from twinkle_serve.engines.host import EngineHost

ADAPTER_IDS = itertools.count(1)


class Files:
    """A store's part for engines."""

    def __init__(self) -> None:
        self.by_id: dict[int, AdapterFiles] = {}

    async def files(self, version: AdapterVersion) -> AdapterFiles:
        return self.by_id[version.id]


@dataclass
class EngineHarness:
    engine: Engine
    host: EngineHost
    files: dict[int, AdapterFiles]
    """By id of the version: what the host's store has."""

    def __post_init__(self) -> None:
        self._ids = itertools.count()
        self.unfinished: set[asyncio.Task[SampleColumns]] = set()

    @property
    def info(self) -> Any:
        return self.engine.info

    async def add(self, name: str, files: AdapterFiles) -> AdapterVersion:
        """Loads an adapter as a router would, through the host."""
        version = AdapterVersion(name=name, version=1, id=next(ADAPTER_IDS), rank=describe_adapter(files).rank)
        self.files[version.id] = files
        await self.host.load_adapter(version)
        return version

    def start(self, group: Group) -> asyncio.Task[SampleColumns]:
        task = asyncio.ensure_future(self.engine.sample_group(group))
        self.unfinished.add(task)
        task.add_done_callback(self.unfinished.discard)
        return task

    def group(self, prompt: np.ndarray, *, count: int = 1, first_sample: int = 0, **params: Any) -> Group:
        seed = params.pop("seed", None)
        adapter = params.pop("adapter", None)
        return Group(
            id=next(self._ids),
            prompt_ids=np.asarray(prompt, np.int32),
            params=SamplingParams(**params),
            count=count,
            first_sample=first_sample,
            seed=seed,
            adapter=adapter,
        )

    async def sample(self, prompts: Sequence[np.ndarray], **options: Any) -> SampleResponse:
        """All prompts in one batch, with the options of `group`."""
        groups = [self.group(prompt, **options) for prompt in prompts]
        parts = await asyncio.gather(*map(self.start, groups))
        widths = {part.logprobs_width for part in parts}
        assert len(widths) == 1
        return SampleResponse(
            columns=SampleColumns.concat(parts).regrouped({group.id: i for i, group in enumerate(groups)}),
            prompts=[group.prompt_ids for group in groups],
            inputs=[{"input_ids": group.prompt_ids} for group in groups],
            logprobs_mode=self.info.logprobs_mode,
            prompt_indices=tuple(range(len(groups))),
        )

    async def one(self, prompt: np.ndarray, **options: Any) -> SampledSequence:
        return (await self.sample([prompt], **options)).sequences[0]

    async def stream(self, prompt: np.ndarray, **options: Any) -> list[TextDelta]:
        group = self.group(prompt, **options)
        return [delta async for delta in self.host.stream((await self.host.describe()).life, group)]
