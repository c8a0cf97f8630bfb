"""Executor of an engine on CPU with one worker. vLLM imports this by name."""

from __future__ import annotations

from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from twinkle_serve.engines.vllm.processes import compute_on


class WorkerInCore(UniProcExecutor):  # type: ignore[misc]  # vLLM has no types
    """Runs the worker in the core, as vLLM does on GPUs.

    On CPU vLLM (0.32, platforms/cpu.py) gives it a process: OpenMP reads its cores from the environment as it is
    loaded. But with a process each, core and worker exchange messages for every step, and both poll for them.
    """

    def _init_executor(self) -> None:
        chosen = OMPProcessManager(self.vllm_config)
        if not chosen.skip_setup:
            compute_on(chosen.cpu_lists[0])
        super()._init_executor()
