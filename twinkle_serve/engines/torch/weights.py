"""The own weights of the torch engine's model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from twinkle_serve.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel


def _own_weights(model: PreTrainedModel) -> dict[str, Parameter]:
    """Returns the model's parameters without those of adapters, under their names without adapters."""
    parameters = model.named_parameters()
    return {name.replace(".base_layer.", "."): value for name, value in parameters if ".lora_" not in name}


def copy_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor], renamed: dict[str, Tensor]) -> None:
    """Copies weights into the model; those that it knows by other names than the checkpoint go to `renamed`."""
    own = _own_weights(model)
    for name, tensor in tensors.items():
        if name not in own:
            renamed[name] = tensor
        elif own[name].shape != tensor.shape:
            raise WeightsError(
                f"weight {name!r} has the shape {tuple(tensor.shape)}, the model's has {own[name].shape}."
            )
        else:
            own[name].data.copy_(tensor)


def copy_renamed(model: PreTrainedModel, renamed: Mapping[str, Tensor]) -> None:
    """Lets transformers convert checkpoint weights to its own, such as the stacked experts of a MoE model."""
    if not renamed or (set(renamed) <= {"lm_head.weight"} and model.config.tie_word_embeddings):
        return
    fresh, info = type(model).from_pretrained(
        None, config=model.config, state_dict=renamed, dtype=model.dtype, output_loading_info=True
    )
    if info["unexpected_keys"] or info["mismatched_keys"]:
        raise WeightsError(f"transformers cannot load the weights {sorted(info['unexpected_keys'])[:3]}.")
    own, missing = _own_weights(model), set(info["missing_keys"])
    for name, value in fresh.named_parameters():
        if name not in missing:
            own[name].data.copy_(value)


def weights_checksum(model: PreTrainedModel) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(_own_weights(model).items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
