"""A script that starts an engine, samples, writes a line, and ends when stdin does. Imports nothing else.

python -m benchmarks.start.script (bare | sampler) ENGINE_ARGS
"""

from __future__ import annotations

import asyncio
import json
import sys


async def bare(engine_args: dict[str, object]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import tokens_input
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args, disable_log_stats=True))
    async for _ in llm.generate(tokens_input([20, 21]), SamplingParams(max_tokens=2), "first"):
        pass
    await until_told()
    llm.shutdown()


async def sampler(engine_args: dict[str, object]) -> None:
    from twinkle_serve import vLLMSampler

    made = await asyncio.to_thread(vLLMSampler, "demo", engine_args)
    await made.sample_async({"input_ids": [20, 21]}, {"max_tokens": 2})
    await until_told()
    await asyncio.to_thread(made.shutdown)


async def until_told() -> None:
    print("sampled", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run({"bare": bare, "sampler": sampler}[sys.argv[1]](json.loads(sys.argv[2])))
