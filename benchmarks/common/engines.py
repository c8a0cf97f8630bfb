"""A service with one vLLM engine, and a bare engine beside it with the same model and arguments."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from tests.support.deploy import deploy
from twinkle_serve.engines.vllm import cpu_defaults
from twinkle_serve.engines.vllm.args import executor_backend
from twinkle_serve.placement import cores_of_engine
from twinkle_serve.sampler import RunningSampler

SERVICE = "sampler"
"""Name of the application."""
SHARE_OF_GPU = 0.3
"""vLLM refuses to start where less than this part of the GPU's memory is free; two engines share the GPU."""

EngineArgs: TypeAlias = dict[str, Any]
"""Arguments of vLLM, by name."""
AsyncLLM: TypeAlias = Any
"""vLLM's, which is imported with the first bare engine."""


@asynccontextmanager
async def side_by_side(
    model: str, engine_args: EngineArgs, device: str, *, same_core: bool = False
) -> AsyncIterator[tuple[RunningSampler, AsyncLLM]]:
    """Starts both at the same time, with the same executor, and shuts both down.

    Args:
        model: directory of the model.
        device: cpu or cuda.
        same_core: on cpu, binds the bare engine's computing thread to the core that the service's engine has.
    """
    if device == "cuda":
        engine_args = {"gpu_memory_utilization": SHARE_OF_GPU, **engine_args}
    mesh = {"dp_size": 1, "device_type": device}
    deploying = asyncio.create_task(
        # Two versions of weights: a delta is of the last delta, though another update came between them.
        asyncio.to_thread(
            deploy, SERVICE, model_id=model, device_mesh=mesh, engine_args=engine_args, weights_versions=2
        )
    )
    await asyncio.sleep(0)  # the thread starts; vLLM is constructed in this one, and blocks it
    with tempfile.TemporaryDirectory(prefix="tsb", ignore_cleanup_errors=True) as cache:
        if device == "cuda":  # both engines compile the same model at the same time
            os.environ["VLLM_CACHE_ROOT"] = cache
        executor = {"distributed_executor_backend": executor_backend("mp", 1, device)}
        llm = bare_engine(model, engine_args | executor, device, same_core=same_core)
        try:
            sampler = await deploying
            yield sampler, llm
            await asyncio.to_thread(sampler.shutdown)
        finally:
            llm.shutdown()
            del llm
            gc.collect()  # vLLM's own finalizer fails when it runs at interpreter exit


def arguments_of_service(model: str, engine_args: EngineArgs, *, same_core: bool) -> EngineArgs:
    """Returns the arguments that the service's engine has on cpu.

    Args:
        same_core: binds engines that this process starts to the core of the service's engine.
    """
    args = cpu_defaults(model, engine_args, 1)
    if args.get("enable_lora"):
        args["max_loras"] = args.get("max_loras", 1) + 1  # as many slots as the service's engine has
    if same_core:
        cores = cores_of_engine(0, 1, 1, sorted(os.sched_getaffinity(0)))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[0]))
    return args


def bare_engine(model: str, engine_args: EngineArgs, device: str, *, same_core: bool) -> AsyncLLM:
    """Starts AsyncLLM in this process with the arguments of the service's engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":
        engine_args = arguments_of_service(model, engine_args, same_core=same_core)
    return AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, disable_log_stats=True, **engine_args))


def cheapest_params(samples: int, tokens: int) -> Any:
    """vLLM's sampling parameters for token ids and logprobs, at the least cost to the caller."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        n=samples,
        max_tokens=tokens,
        ignore_eos=True,
        temperature=1.0,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


async def first_token(llm: AsyncLLM, prompt: list[int], request_id: str, lora_request: Any = None) -> None:
    """Samples one token with a bare engine."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=1, detokenize=False)
    async for _ in llm.generate(tokens_input(prompt), params, request_id, lora_request=lora_request):
        pass
