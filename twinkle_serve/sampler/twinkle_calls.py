"""Calls of Twinkle's samplers that are served by others here, or refused with the call to make instead."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any, NoReturn

from twinkle_serve.errors import UnsupportedError

if TYPE_CHECKING:
    from twinkle_serve.data_format import InputFeature, Trajectory

BY_UPDATE_WEIGHTS = "Call update_weights(state_dict or pairs, version), or add_adapter_to_model for a LoRA adapter."


class TwinkleCalls:
    """Mixed into RunningSampler, whose calls it makes."""

    encode_trajectory: Any
    update_weights: Any

    def encode_trajectory_for_vllm(
        self, trajectory: Trajectory, adapter_name: str = "", add_generation_prompt: bool = True
    ) -> InputFeature:
        """As `encode_trajectory`."""
        feature: InputFeature = self.encode_trajectory(trajectory, adapter_name, add_generation_prompt)
        return feature

    def load_full_weights_from_path(self, path: str | os.PathLike[str]) -> int:
        """Replaces the model's weights by those of a directory, by `update_weights`. Returns 1."""
        self.update_weights(path, f"{os.fspath(path)}#{uuid.uuid4().hex[:8]}")
        return 1

    def reset_mm_cache(self) -> None:
        """Does nothing: engines here sample from text, and keep no images."""

    def reset_encoder_cache(self) -> None:
        """Does nothing: engines here sample from text, and keep no encoded images."""

    def add_adapter_to_sampler(self, adapter_name: str, config: object) -> NoReturn:
        """Raises UnsupportedError: a config alone has no weights."""
        raise UnsupportedError(
            f"add_adapter_to_sampler({adapter_name!r}, config) has no weights. Call "
            "add_adapter_to_model(name, config, state_dict=…), or with a directory."
        )

    def apply_patch(self, patch_cls: object, **kwargs: object) -> NoReturn:
        """Raises UnsupportedError: engines run in other processes."""
        raise UnsupportedError("apply_patch: a sampler's engines cannot be patched. Set what differs in engine_args.")

    def prepare_checkpoint_engine(self, is_master: object = None) -> NoReturn:
        """Raises UnsupportedError: weights come by `update_weights`."""
        raise UnsupportedError(f"prepare_checkpoint_engine: a sampler has no checkpoint engine. {BY_UPDATE_WEIGHTS}")

    def init_checkpoint_process_group(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises UnsupportedError: weights come by `update_weights`."""
        raise UnsupportedError(f"init_checkpoint_process_group: weights need no process group. {BY_UPDATE_WEIGHTS}")

    def finalize_checkpoint_engine(self) -> NoReturn:
        """Raises UnsupportedError: weights come by `update_weights`."""
        raise UnsupportedError(f"finalize_checkpoint_engine: there is no checkpoint engine. {BY_UPDATE_WEIGHTS}")

    def receive_weights(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises UnsupportedError: weights come by `update_weights`."""
        raise UnsupportedError(f"receive_weights: a sampler here is sent its weights. {BY_UPDATE_WEIGHTS}")

    def sample_stream_to_queue(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises UnsupportedError: a stream is an iterator."""
        raise UnsupportedError("sample_stream_to_queue: iterate over sample_stream() and put its items in the queue.")
