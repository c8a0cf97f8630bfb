"""`twinkle.utils.framework`: torch's devices and seeds."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from twinkle_serve.errors import ConfigError
from twinkle_serve.platform import Platform
from twinkle_serve.remote.session import seed_everything


class Torch:
    """torch of this process, which is imported on use."""

    @staticmethod
    def is_torch_available() -> bool:
        """Whether torch is installed."""
        return find_spec("torch") is not None

    @staticmethod
    def is_gpu_available() -> bool:
        """Whether torch has a GPU."""
        if not Torch.is_torch_available():
            return False
        import torch

        return bool(torch.cuda.is_available())

    @staticmethod
    def is_npu_available() -> bool:
        """False: there are no NPUs here."""
        return False

    @staticmethod
    def empty_cache() -> None:
        """Gives cached memory back to the GPU, if there is one."""
        if Torch.is_gpu_available():
            import torch

            torch.cuda.empty_cache()

    @staticmethod
    def synchronize() -> None:
        """Waits for the GPU, if there is one."""
        if Torch.is_gpu_available():
            import torch

            torch.cuda.synchronize()

    @staticmethod
    def get_current_device() -> int | str:
        """Index of the current GPU, or cpu."""
        if not Torch.is_gpu_available():
            return "cpu"
        import torch

        return int(torch.cuda.current_device())

    @staticmethod
    def get_device(local_rank: int | None = None) -> str:
        """Device of a local rank, by default this process's: cuda:0 or cpu, for example."""
        return Platform.get_local_device(local_rank, platform="GPU" if Torch.is_gpu_available() else "CPU")

    @staticmethod
    def set_device(local_rank: int | str | None = None) -> None:
        """Makes the device of a local rank the current one, if there is a GPU."""
        if Torch.is_gpu_available():
            import torch

            torch.cuda.set_device(Torch.get_device(local_rank) if not isinstance(local_rank, str) else local_rank)

    @staticmethod
    def seed_everything(seed: int | None = 42, full_determinism: bool = False) -> None:
        """Seeds random, numpy, and torch if it has been imported.

        Raises:
            ConfigError: `full_determinism`, which needs kernels that the caller chooses.
        """
        if full_determinism:
            raise ConfigError("full_determinism must be False. Set torch's deterministic kernels yourself.")
        if seed is not None:
            seed_everything(seed)

    @staticmethod
    def to_local_tensor(tensor: Any) -> Any:
        """Returns a tensor whole: a DTensor is gathered."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
