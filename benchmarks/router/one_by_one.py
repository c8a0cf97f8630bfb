"""The baseline for the router: a graph that calls the engine once per sample."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from benchmarks.common.engines import EngineArgs
from deployments.log_config import QUIET
from twinkle_serve import hub
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.groups import EngineKind, Group
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines import build_engine


@serve.deployment(max_ongoing_requests=100_000, logging_config=QUIET)
class OneEngine:
    """The baseline's engine: one call, one sample."""

    async def __init__(self, kind: EngineKind, engine_args: EngineArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        self._engine = build_engine(kind, "reference", str(hub.DEMO), engine_args)
        self._ids = itertools.count()
        await self._engine.start()

    async def sample(self, prompt_ids: NDArray[np.int32], params: SamplingParams) -> SampleColumns:
        return await self._engine.sample_group(
            Group(id=next(self._ids), prompt_ids=prompt_ids, params=DecodingParams.of(params))
        )


@serve.deployment(max_ongoing_requests=100_000, logging_config=QUIET)
class OneByOne:
    """The baseline's router: calls the engine for each sample."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine

    async def sample(
        self, prompt_ids: NDArray[np.int32], params: SamplingParams, num_samples: int
    ) -> list[SampleColumns]:
        calls = [self._engine.sample.remote(prompt_ids, params) for _ in range(num_samples)]
        return list(await asyncio.gather(*calls))
