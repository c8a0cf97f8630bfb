"""Ways to sample: the bare engine, vLLM's own server, and the service. All return token ids and logprobs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import psutil

from benchmarks.common.engines import AsyncLLM, EngineArgs, cheapest_params
from benchmarks.common.vllm_server import process_tree, vllm_server
from twinkle_serve.sampler import RunningSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Samples of one prompt: the same work for each way."""

    ids: Sequence[int]
    tokens: int
    samples: int = 1
    adapter: str = ""


class Way(Protocol):
    """One way to sample."""

    async def sample(self, job: Job) -> list[list[int]]:
        """Samples one prompt. Returns the token ids of each sample."""
        ...

    async def sample_all(self, jobs: Sequence[Job]) -> list[list[list[int]]]:
        """Samples jobs of one number of samples, in one call where the way has such calls."""
        ...

    def processes(self) -> list[psutil.Process]:
        """Returns the processes that work for it, the caller's left out."""
        ...


class Bare(Way):
    """AsyncLLM in this process, called in its cheapest way."""

    def __init__(self, llm: AsyncLLM, adapters: Mapping[str, Path], processes: Sequence[psutil.Process]) -> None:
        from vllm.lora.request import LoRARequest

        self._llm, self._processes = llm, list(processes)
        self._ids = itertools.count()
        self._adapters = {
            name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)
        }

    async def sample(self, job: Job) -> list[list[int]]:
        from vllm.inputs import tokens_input

        params = cheapest_params(job.samples, job.tokens)
        output: Any = None
        lora = self._adapters.get(job.adapter)
        request_id = f"bare-{next(self._ids)}"
        async for latest in self._llm.generate(tokens_input(list(job.ids)), params, request_id, lora_request=lora):
            output = latest
        return [list(sample.token_ids) for sample in output.outputs]

    async def sample_all(self, jobs: Sequence[Job]) -> list[list[list[int]]]:
        return await asyncio.gather(*map(self.sample, jobs))

    def processes(self) -> list[psutil.Process]:
        return self._processes


class Endpoint(Way):
    """`vllm serve`, called at its endpoint of tokens in, tokens out."""

    def __init__(self, url: str, model: str, session: aiohttp.ClientSession, server: int | None = None) -> None:
        self._url, self._model, self._session, self._server = url, model, session, server

    async def sample(self, job: Job) -> list[list[int]]:
        body = {
            "model": job.adapter or self._model,
            "token_ids": list(job.ids),
            "sampling_params": {"n": job.samples, "max_tokens": job.tokens, "ignore_eos": True, "logprobs": 0},
        }
        async with self._session.post(f"{self._url}/inference/v1/generate", json=body) as answer:
            answer.raise_for_status()
            choices = (await answer.json())["choices"]
        assert all(len(choice["logprobs"]["content"]) == job.tokens for choice in choices)
        return [choice["token_ids"] for choice in choices]

    async def sample_all(self, jobs: Sequence[Job]) -> list[list[list[int]]]:
        return await asyncio.gather(*map(self.sample, jobs))

    def processes(self) -> list[psutil.Process]:
        return [] if self._server is None else process_tree(self._server)


class Service(Way):
    """The service, through `connect`."""

    def __init__(self, sampler: RunningSampler, others: Sequence[int] = ()) -> None:
        """
        Args:
            others: ids of processes below this one that are not the service's.
        """
        self._sampler, self._others = sampler, others

    async def sample(self, job: Job) -> list[list[int]]:
        return (await self.sample_all([job]))[0]

    async def sample_all(self, jobs: Sequence[Job]) -> list[list[list[int]]]:
        (adapter,) = {job.adapter for job in jobs}
        response = await self._sampler.sample_async(
            [{"input_ids": job.ids} for job in jobs],
            [{"max_tokens": job.tokens, "ignore_eos": True} for job in jobs],
            adapter,
            num_samples=jobs[0].samples,
        )
        columns = response.columns
        assert columns.logprobs is not None and len(columns.logprobs) == len(columns.tokens)
        return [[sequence.tokens for sequence in prompt.sequences] for prompt in response]

    def processes(self) -> list[psutil.Process]:
        others = {process.pid for pid in self._others for process in process_tree(pid)}
        return [each for each in psutil.Process().children(recursive=True) if each.pid not in others]


@asynccontextmanager
async def endpoint(
    model: str, engine_args: EngineArgs, adapters: Mapping[str, Path], port: int, log: Path
) -> AsyncIterator[Endpoint]:
    """Starts `vllm serve` with the same arguments, and ends it."""
    async with (
        vllm_server(model, engine_args, adapters, port, log) as (url, pid),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3)) as session,
    ):
        yield Endpoint(url, model, session, pid)
