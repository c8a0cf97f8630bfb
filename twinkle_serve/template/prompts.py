"""Inputs of a call to prompts: what a caller hands in, checked, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.errors import PromptError, unknown_name
from twinkle_serve.template.template import Template

TRAJECTORY_KEYS = {"messages", "tools", "images", "videos", "user_data"}
PIXELS = ("images", "videos", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One input of a call."""

    ids: NDArray[np.int32]
    """Shape [P]."""
    source: dict[str, Any]
    """The input that it was made from."""


def encode_inputs(inputs: Any, template: Template) -> list[Prompt]:
    """Each input as a prompt, in order. One dict is one input.

    Raises:
        PromptError: no input, inputs of several kinds, or one that is no Trajectory and no InputFeature.
    """
    if isinstance(inputs, Mapping):
        inputs = [inputs]
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
        raise PromptError(
            f"inputs must be a Trajectory or an InputFeature, or a list of one of them, got {type(inputs).__name__}. "
            'Give text as {"messages": [{"role": "user", "content": text}]}.'
        )
    if not inputs:
        raise PromptError("inputs is empty. Give at least one Trajectory or InputFeature.")
    kinds = [_kind(item, i) for i, item in enumerate(inputs)]
    if len(set(kinds)) > 1:
        other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise PromptError(
            f"inputs mixes kinds: inputs[0] is {_article(kinds[0])}, inputs[{other}] is {_article(kinds[other])}. "
            "Send each kind in a call of its own."
        )
    encode = _from_messages if kinds[0] == "messages" else _from_ids
    return [encode(item, f"inputs[{i}]", template) for i, item in enumerate(inputs)]


def _kind(item: Any, i: int) -> str:
    if not isinstance(item, Mapping):
        raise PromptError(
            f"inputs[{i}] is {type(item).__name__}, not a Trajectory (a dict with messages) or an InputFeature "
            "(a dict with input_ids)."
        )
    kinds = [kind for kind in ("messages", "input_ids") if kind in item]
    # A sample's new_input_feature has both: it goes on from its tokens.
    if not kinds:
        close = unknown_name("input", next(iter(item), ""), ("messages", "input_ids")).split(" Known:")[0]
        raise PromptError(
            f"inputs[{i}] has neither messages nor input_ids: {close} Its keys: {sorted(map(str, item))}."
        )
    return kinds[-1]


def _article(kind: str) -> str:
    return "a Trajectory (messages)" if kind == "messages" else "an InputFeature (input_ids)"


def _refuse_pixels(item: Mapping[str, Any], where: str) -> None:
    for key in PIXELS:
        value = item.get(key)
        if value is not None and not (isinstance(value, Sequence) and not value):
            raise PromptError(f"{where}.{key}: this service samples from text alone. Leave it out.")


def _from_messages(item: Mapping[str, Any], where: str, template: Template) -> Prompt:
    for key in item:
        if key not in TRAJECTORY_KEYS:
            raise PromptError(f"{where}: {unknown_name('key of a Trajectory', key, TRAJECTORY_KEYS)}.")
    _refuse_pixels(item, where)
    messages = item["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise PromptError(f"{where}.messages must be a list of at least one message, got {messages!r}.")
    for j, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"{where}.messages[{j}] must be a dict with a role, got {message!r}.")
    return Prompt(template.encode(list(messages), item.get("tools") or None, where), dict(item))


def _array(value: Any, where: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of several lengths; a tensor on a GPU
        raise PromptError(f"{where} is no array of numbers: {error}") from None


def _from_ids(item: Mapping[str, Any], where: str, template: Template) -> Prompt:
    _refuse_pixels(item, where)
    ids = _array(item["input_ids"], f"{where}.input_ids")
    if ids.size and ids.dtype.kind not in "iu":
        raise PromptError(f"{where}.input_ids must be whole numbers, got {ids.dtype}.")
    if ids.ndim != 1:
        raise PromptError(
            f"{where}.input_ids must have one dimension, got shape {ids.shape}. Send each row as an InputFeature."
        )
    if item.get("attention_mask") is not None:
        mask = _array(item["attention_mask"], f"{where}.attention_mask")
        if mask.shape != ids.shape:
            raise PromptError(f"{where}.attention_mask has shape {mask.shape}, input_ids {ids.shape}. Leave it out.")
        if not mask.all():
            hidden = int((mask == 0).sum())
            raise PromptError(f"{where}.attention_mask hides {hidden} of {len(ids)} tokens. Send input_ids unpadded.")
    if ids.size and (ids.max() > np.iinfo(np.int32).max or ids.min() < 0):
        bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise PromptError(f"{where}.input_ids holds {bad}, which is no token id.")
    return Prompt(ids.astype(np.int32), dict(item))
