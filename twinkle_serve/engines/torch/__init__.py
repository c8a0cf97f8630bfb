"""The torch engine: batched transformers generate, for debugging and as a reference for vllm."""

from twinkle_serve.engines.torch.args import TorchArgs, check_engine_args
from twinkle_serve.engines.torch.engine import TorchEngine

__all__ = ["TorchArgs", "TorchEngine", "check_engine_args"]
