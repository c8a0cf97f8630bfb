"""An engine under test, with the bookkeeping that tests would repeat."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.samplers import ENGINE_ARGS
from twinkle_serve import hub
from twinkle_serve.adapter_description import describe_adapter
from twinkle_serve.checkpoint import named_tensors
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import EngineKind, Group, Session, TextDelta
from twinkle_serve.data_format.response import SampledSequence, SampleResponse
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.sampling_params import DecodingParams, SamplingParams
from twinkle_serve.data_format.weights import CHECKPOINT_VERSION, Bucket, WeightsVersion
from twinkle_serve.engines import build_engine
from twinkle_serve.engines.protocol import Engine
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.packing import buckets

Prompts = list[np.ndarray]
LOGPROB_TOLERANCE = 1e-3
"""Between engines, and between a sample and its score, in float32."""
ADAPTER_IDS = itertools.count(1)


class Files:
    """A store's part for engines."""

    def __init__(self) -> None:
        self.by_id: dict[int, AdapterFiles] = {}

        self.buckets: dict[str, list[Bucket]] = {}
        """Of each version of the model's own weights, by its label."""

    async def files(self, version: AdapterVersion) -> AdapterFiles:
        return self.by_id[version.id]

    async def current_weights(self, track: str) -> WeightsVersion:
        return CHECKPOINT_VERSION

    async def bucket(self, version: WeightsVersion, index: int) -> Bucket:
        return self.buckets[version.label][index]


@dataclass
class EngineHarness:
    engine: Engine
    server: EngineServer
    files: Files
    """The server's store."""

    def __post_init__(self) -> None:
        self._ids = itertools.count()
        self.unfinished: set[asyncio.Task[SampleColumns]] = set()

    @property
    def info(self) -> Any:
        return self.engine.info

    async def add(self, name: str, files: AdapterFiles) -> AdapterVersion:
        """Loads an adapter as a router would, through the server."""
        version = AdapterVersion(name=name, version=1, id=next(ADAPTER_IDS), rank=describe_adapter(files).rank)
        self.files.by_id[version.id] = files
        await self.server.load_adapter(version)
        return version

    async def load(self, label: str, weights: Any, bucket_bytes: int = 2**20) -> str:
        """Loads weights as a router would, through the server, which must be paused. Returns the checksum."""
        self.files.buckets[label] = list(buckets(named_tensors(weights), bucket_bytes))
        checksums = tuple(str(number) for number in range(len(self.files.buckets[label])))
        return await self.server.load_weights(WeightsVersion(label=label, number=1, buckets=checksums))

    def start(self, group: Group) -> asyncio.Task[SampleColumns]:
        task = asyncio.ensure_future(self.engine.sample_group(group))
        self.unfinished.add(task)
        task.add_done_callback(self.unfinished.discard)
        return task

    def group(self, prompt: np.ndarray, *, count: int = 1, first_sample: int = 0, **params: Any) -> Group:
        seed = params.pop("seed", None)
        adapter = params.pop("adapter", None)
        sample_timeout_s = params.pop("sample_timeout_s", None)
        return Group(
            id=next(self._ids),
            prompt_ids=np.asarray(prompt, np.int32),
            params=DecodingParams.of(SamplingParams(**params)),
            count=count,
            first_sample=first_sample,
            seed=seed,
            adapter=adapter,
            sample_timeout_s=sample_timeout_s,
        )

    async def sample(self, prompts: Sequence[np.ndarray], **options: Any) -> SampleResponse:
        """All prompts in one batch, with the options of `group`."""
        groups = [self.group(prompt, **options) for prompt in prompts]
        return self.response_of(prompts, await asyncio.gather(*map(self.start, groups)))

    def response_of(self, prompts: Sequence[np.ndarray], parts: Sequence[SampleColumns]) -> SampleResponse:
        """The response to prompts, out of the samples of a group for each."""
        widths = {part.logprobs_width for part in parts}
        assert len(widths) == 1
        indices = {int(part.group[0]): i for i, part in enumerate(parts)}
        return SampleResponse(
            columns=SampleColumns.concat(parts).regrouped(indices),
            prompts=[np.asarray(prompt, np.int32) for prompt in prompts],
            inputs=[{"input_ids": prompt} for prompt in prompts],
            logprobs_mode=self.info.logprobs_mode,
            prompt_indices=tuple(range(len(prompts))),
        )

    async def one(self, prompt: np.ndarray, **options: Any) -> SampledSequence:
        return (await self.sample([prompt], **options)).sequences[0]

    async def stream(self, prompt: np.ndarray, **options: Any) -> list[TextDelta]:
        group = self.group(prompt, **options)
        return [delta async for delta in self.server.stream(await self.session(), group)]

    async def session(self) -> Session:
        """A router's session with the server."""
        return Session(incarnation=(await self.server.describe("test")).incarnation, router="test")


@contextlib.asynccontextmanager
async def started(kind: EngineKind, model: Path = hub.DEMO, **more: Any) -> AsyncIterator[EngineHarness]:
    """An engine of a kind, in this process, with more engine arguments."""
    args = {**ENGINE_ARGS[kind], **more}
    engine = build_engine(kind, f"{kind}-under-test", str(model), args, cpus=[(0,)] if kind == "vllm" else [])
    store: Any = Files()
    server = EngineServer(engine, model, store)
    try:
        await server.start(kind, 300)
    except BaseException:
        await server.stop()
        raise
    harness = EngineHarness(engine, server, store)
    yield harness
    assert not harness.unfinished, "a test left groups running"
    await server.stop()
