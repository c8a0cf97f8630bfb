"""The weights of a torch model, which PEFT's adapters may wrap, by the names of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from twinkle_serve.adapter_description import SUPPORTED
from twinkle_serve.errors import AdapterError, UnsupportedError

MERGED_TOO = ("bias", "modules_to_save", "velora_config")
"""Keys of a LoraConfig that a merged model can have with any value: they leave the sum of weights as it is."""

_PREFIX = "base_model.model."
_SAVED = ".modules_to_save."


def own_weights(model: Any, *, merged: bool) -> Iterator[tuple[str, Any]]:
    """Yields the weights of a model by the names of its checkpoint; the model is not changed.

    Args:
        merged: add what the active adapters learnt, to copies.

    Raises:
        UnsupportedError: adapters that are not plain LoRA, or one that is merged already and is not to be.
        AdapterError: an adapter to be merged is of a weight that two modules share.
    """
    if not getattr(model, "peft_config", None):
        yield from model.state_dict().items()
        return
    active = set(model.active_adapters) if merged else set()
    _require_plain_lora(model)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    _require_unmerged(layers, active)
    _require_own_weights(model, layers, active)
    for name, tensor in model.state_dict().items():
        place, base, rest = name.partition(".base_layer.")
        if base and rest == "weight" and place in layers:
            # One delta at a time: the sum of an adapter over all layers is as large as the model.
            layer = layers[place]
            added = active & (set(layer.lora_A) | set(layer.lora_embedding_A)) - set(layer.merged_adapters)
            for adapter in sorted(added):
                tensor = tensor + layer.get_delta_weight(adapter).to(tensor.dtype)
        own = _checkpoint_name(name, active)
        if own is not None:
            yield own, tensor


def _checkpoint_name(name: str, active: set[str]) -> str | None:
    """Returns the name of a weight in the checkpoint; None for one that is not there."""
    name = name.removeprefix(_PREFIX)
    if ".lora_" in name:
        return None
    if _SAVED in name:
        place, _, rest = name.partition(_SAVED)
        adapter, _, parameter = rest.partition(".")
        return f"{place}.{parameter}" if adapter in active else None
    place, original, rest = name.partition(".original_module.")
    if original:
        return None if active else f"{place}.{rest}"
    return name.replace(".base_layer.", ".")


def _require_own_weights(model: Any, layers: Mapping[str, Any], active: set[str]) -> None:
    """Raises AdapterError for an adapter of a weight that two modules share: merging it would change both."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_checkpoint_name(name, active) or name)
    for place, layer in layers.items():
        shared = names[id(layer.get_base_layer().weight)]
        if len(shared) > 1 and (adapters := sorted(active & (set(layer.lora_A) | set(layer.lora_embedding_A)))):
            raise AdapterError(
                f"adapter {adapters[0]!r} has matrices for {place.removeprefix(_PREFIX)}, and the model has one weight "
                f"for {' and '.join(shared)} (tie_word_embeddings): they cannot be merged into one of these alone. "
                "Train without that module in target_modules, or a model whose weights are not tied."
            )


def _require_plain_lora(model: Any) -> None:
    for name, config in model.peft_config.items():
        kind = str(getattr(config, "peft_type", "")).rpartition(".")[2]
        special = [
            f"{key}={getattr(config, key)!r}"
            for key, plain in SUPPORTED.items()
            if key not in MERGED_TOO and getattr(config, key, None) not in plain
        ]
        if kind != "LORA" or special:
            raise UnsupportedError(
                f"adapter {name!r} is {kind}{' with ' * bool(special)}{', '.join(special)}, which is not merged here. "
                "Merge it into the model, and call sampler.update_weights(model.state_dict(), version)."
            )


def _require_unmerged(layers: dict[str, Any], sent: set[str]) -> None:
    """Refuses adapters that PEFT has merged into the model's own weights and that are not to be sent with them."""
    merged = {adapter for layer in layers.values() for adapter in layer.merged_adapters}
    if others := sorted(merged - sent):
        raise UnsupportedError(
            f"the model's own weights have the adapter {', '.join(others)} merged into them. Call "
            "model.unmerge_adapter() first."
        )
