"""This process's rank and devices, as launchers such as torchrun set them in its environment."""

from __future__ import annotations

import os
import shutil

from twinkle_serve.errors import UnsupportedError


class Platform:
    """Names follow Twinkle's Platform."""

    @staticmethod
    def get_rank() -> int:
        """Rank of this process among all; -1 if no launcher has set it."""
        return int(os.environ.get("RANK", -1))

    @staticmethod
    def get_local_rank() -> int:
        """Rank of this process on its node; -1 if no launcher has set it."""
        return int(os.environ.get("LOCAL_RANK", -1))

    @staticmethod
    def get_world_size() -> int:
        """Number of processes."""
        return int(os.environ.get("WORLD_SIZE", 1))

    @staticmethod
    def get_local_world_size() -> int:
        """Number of processes on this node."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    @staticmethod
    def get_nnodes() -> int:
        """Number of nodes."""
        return int(os.environ.get("NNODES", 1))

    @staticmethod
    def get_node_rank() -> int:
        """Rank of this node."""
        return int(os.environ.get("NODE_RANK", 0))

    @staticmethod
    def is_master() -> bool:
        """Whether this is the first process, or the only one."""
        return Platform.get_rank() in (-1, 0)

    @staticmethod
    def is_local_master() -> bool:
        """Whether this is the first process of its node, or the only one."""
        return Platform.get_local_rank() in (-1, 0)

    @staticmethod
    def is_last_rank() -> bool:
        """Whether this is the last process, or the only one."""
        return Platform.get_rank() in (-1, Platform.get_world_size() - 1)

    @staticmethod
    def get_platform_names() -> list[str]:
        """Names that `get_platform` takes."""
        return ["GPU", "CPU"]

    @staticmethod
    def get_platform(platform: str | None = None) -> type[Platform]:
        """Returns the class of a platform.

        Args:
            platform: GPU, CUDA or CPU. None: GPU if this machine has one, else CPU.

        Raises:
            UnsupportedError: another platform.
        """
        if platform is None:
            return GPU if shutil.which("nvidia-smi") else CPU
        known: dict[str, type[Platform]] = {"GPU": GPU, "CUDA": GPU, "CPU": CPU}
        if platform.upper() not in known:
            raise UnsupportedError(f"platform must be one of {', '.join(known)}, got {platform!r}.")
        return known[platform.upper()]

    @staticmethod
    def device_prefix(platform: str | None = None) -> str:
        """Type of its devices: cuda or cpu."""
        return "cpu" if Platform.get_platform(platform) is CPU else "cuda"

    @staticmethod
    def visible_device_env(platform: str | None = None) -> str | None:
        """Environment variable that names its devices; None for cpu."""
        return None if Platform.get_platform(platform) is CPU else "CUDA_VISIBLE_DEVICES"

    @staticmethod
    def get_local_device(idx: int | None = None, *, platform: str | None = None) -> str:
        """Device of this process, or of a local rank."""
        prefix = Platform.device_prefix(platform)
        local_rank = max(0, Platform.get_local_rank() if idx is None else idx)
        return prefix if prefix == "cpu" else f"{prefix}:{local_rank}"


class GPU(Platform):
    """NVIDIA's GPUs."""


class CPU(Platform):
    """The cores of this machine."""
