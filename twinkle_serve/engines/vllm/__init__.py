"""The vllm engine: AsyncLLM with PagedAttention, continuous batching and the prefix cache."""

from twinkle_serve.engines.vllm.args import argument_names, check_engine_args, cpu_defaults
from twinkle_serve.engines.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine", "argument_names", "check_engine_args", "cpu_defaults"]
