"""Adapters of the torch engine's model, by peft."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from twinkle_serve.adapter_description import describe_adapter, not_in_model
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PEFT_KEYS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
"""Keys of a LoraConfig that affect the adapter's output."""


class ModelAdapters:
    """Loads adapters into a model, of which one or none is active. Used by the model's thread only."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._peft: PeftModel | None = None
        """peft's wrapper, created with the first adapter; it changes the model in place."""
        self._active: str | None = None
        """peft's name of the active adapter; None for the base model."""

    def load(self, version: AdapterVersion, files: AdapterFiles) -> None:
        """Loads an adapter version, without activating it.

        Raises:
            AdapterError: the model lacks a module of it, or peft refuses it. Nothing is loaded.
        """
        import safetensors.torch
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        adapter = describe_adapter(files)
        # Modules as named by the tensors: the config's target_modules may match more or fewer.
        names = {name.replace(".base_layer", "") for name, _ in self._model.named_modules()}
        if missing := adapter.modules - names:
            raise not_in_model(missing)
        options = {key: adapter.config[key] for key in PEFT_KEYS if adapter.config.get(key) is not None}
        config = LoraConfig(target_modules=sorted(adapter.modules), inference_mode=True, **options)
        name = _peft_name(version)
        loaded = False
        try:
            if self._peft is None:
                self._peft = get_peft_model(self._model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
            result = set_peft_model_state_dict(self._peft, safetensors.torch.load(files.weights), adapter_name=name)
            if result.unexpected_keys:
                raise not_in_model(set(result.unexpected_keys))
            loaded = True
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise AdapterError(f"peft refuses adapter {version.name!r}: {error}") from error
        finally:
            if not loaded and self._peft is not None and name in self._peft.peft_config:
                self._peft.delete_adapter(name)
            self._activate(self._active)  # peft activates a new adapter

    def drop(self, version: AdapterVersion) -> None:
        assert self._peft is not None
        name = _peft_name(version)
        if self._active == name:
            self._activate(None)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # another adapter becomes active
            self._peft.delete_adapter(name)

    def activate(self, version: AdapterVersion | None) -> None:
        """Switches the model to an adapter, or to the base model."""
        self._activate(None if version is None else _peft_name(version))

    def _activate(self, name: str | None) -> None:
        self._active = name
        if self._peft is None:
            return
        if name is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(name, inference_mode=True)


def _peft_name(version: AdapterVersion) -> str:
    return f"v{version.id}"
