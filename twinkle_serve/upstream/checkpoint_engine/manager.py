"""Keeps a sampler's weights those of a model that is being trained."""

from __future__ import annotations

import uuid
from typing import Any

from twinkle_serve.errors import UnsupportedError
from twinkle_serve.peft_models import own_weights
from twinkle_serve.sampler import RunningSampler

SYNCED = "synced"
"""Name of the adapter that `sync_weights(merge_and_sync=False)` keeps up to date."""

REMEDY = (
    "In the process that has the weights, call sampler.update_weights(state_dict or pairs, version), and for LoRA "
    "sampler.add_adapter_to_model(name, config, state_dict=…) and sampler.default_adapter = name."
)


class CheckpointEngineManager:
    """Sends the weights of a torch or PEFT model of this process to a sampler."""

    def __init__(self, model: Any, sampler: Any, platform: str | None = None) -> None:
        """
        Args:
            model: a torch module, or one with PEFT's LoRA adapters.
            sampler: a sampler of this package.
            platform: makes no difference: weights travel through files in memory.

        Raises:
            UnsupportedError: another model or sampler.
        """
        if not callable(getattr(model, "named_modules", None)):
            raise UnsupportedError(
                f"CheckpointEngineManager takes a torch module, got {type(model).__name__}. {REMEDY}"
            )
        if not isinstance(sampler, RunningSampler):
            raise UnsupportedError(
                f"CheckpointEngineManager takes vLLMSampler, TorchSampler or connect(), got {type(sampler).__name__}."
            )
        self.model, self.sampler = model, sampler
        self.base_sync_done = False

    def sync_weights(self, merge_and_sync: bool = True) -> None:
        """Makes the sampler's weights those of the model.

        Args:
            merge_and_sync: send all weights, adapters merged into copies of them. False: the first call sends the
                model's own weights, without adapters; later ones the active adapter alone, which becomes the sampler's
                `default_adapter`. Each sample's `adapter` then names its version, `synced@n`.

        Raises:
            UnsupportedError: adapters that are not plain LoRA, several where one is sent, or one that is merged into
                the weights that are sent without it.
            WeightsError: as `update_weights`.
            AdapterError: as `add_adapter_to_model`; or an adapter to be merged is of a weight that two modules share.
        """
        config = getattr(self.model, "peft_config", None)
        if merge_and_sync or not self.base_sync_done or not config:
            weights = own_weights(self.model, merged=merge_and_sync)
            self.sampler.update_weights(weights, f"sync-{uuid.uuid4().hex[:12]}")
            self.sampler.default_adapter = ""
            self.base_sync_done = True
            return
        from peft import get_peft_model_state_dict

        name = _active(self.model)
        tensors = get_peft_model_state_dict(self.model, adapter_name=name)
        self.sampler.add_adapter_to_model(SYNCED, config[name], state_dict=tensors)
        self.sampler.default_adapter = SYNCED


def _active(model: Any) -> str:
    active = list(getattr(model, "active_adapters", []))
    if len(active) != 1:
        raise UnsupportedError(f"one adapter of the model must be active, these are: {', '.join(active) or 'none'}.")
    return str(active[0])
