"""Services with one engine, and prompts for them."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import numpy as np

from benchmarks.common.engines import EngineArgs
from tests.support.deploy import deploy
from twinkle_serve import InputFeature
from twinkle_serve.sampler import RunningSampler

PROMPT_TOKENS = 32
VLLM_ARGS = {"max_model_len": 256, "dtype": "float32", "max_num_seqs": 256, "kv_cache_memory_bytes": 2**28}


def engine_args(options: argparse.Namespace) -> EngineArgs:
    return dict(VLLM_ARGS) if options.engine == "vllm" else {}


async def started(name: str, engine: str, engine_args: EngineArgs, **args: Any) -> RunningSampler:
    """Deploys a service with one engine and returns its sampler."""
    mesh = {"dp_size": 1}
    sampler = await asyncio.to_thread(deploy, name, engine=engine, device_mesh=mesh, engine_args=engine_args, **args)
    await sampler.sample_async(prompts_of(1, 0)[0], {"max_tokens": 1})
    return sampler


def prompts_of(count: int, seed: int) -> list[InputFeature]:
    ids = np.random.default_rng(seed).integers(32, 127, (count, PROMPT_TOKENS)).astype(np.int32)
    return [{"input_ids": row} for row in ids]
