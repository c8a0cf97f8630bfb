"""What the router is measured against: a graph that calls the engine once a sample."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from ray import serve

from deployments.log_config import QUIET
from twinkle_serve import hub
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines import build_engine


@serve.deployment(max_ongoing_requests=100_000, logging_config=QUIET)
class OneEngine:
    """The reference's engine: a call is a sample."""

    async def __init__(self, kind: Any, engine_args: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._engine = build_engine(kind, "reference", str(hub.DEMO), engine_args)
        self._ids = itertools.count()
        await self._engine.start()

    async def sample(self, prompt_ids: Any, params: SamplingParams) -> SampleColumns:
        group = Group(id=next(self._ids), prompt_ids=prompt_ids, params=DecodingParams.of(params))
        return await self._engine.sample_group(group)


@serve.deployment(max_ongoing_requests=100_000, logging_config=QUIET)
class OneByOne:
    """The reference's router: each sample is a call of the engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def sample(self, prompt_ids: Any, params: SamplingParams, num_samples: int) -> list[SampleColumns]:
        calls = [self._engine.sample.remote(prompt_ids, params) for _ in range(num_samples)]
        return list(await asyncio.gather(*calls))
