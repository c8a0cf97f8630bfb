"""Validates the inputs of a call and converts them to prompts of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.inputs import as_list
from twinkle_serve.data_format.messages import Encoded, Turn, checksum
from twinkle_serve.data_format.response import IGNORED_LABEL
from twinkle_serve.errors import PromptError, unknown_name
from twinkle_serve.template.template import Template

TRAJECTORY_KEYS = {"messages", "tools", "images", "videos", "user_data"}
PIXELS = ("images", "videos", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")

MAX_ID = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of one input of a call."""

    ids: NDArray[np.int32]
    """Token ids, shape [P]."""
    index: int = 0
    """Index of its input in the call; `truncation_strategy="delete"` leaves inputs out."""
    turn: Turn = field(default_factory=Turn)
    """The beginning of the sampled turn that it contains, and the labels of earlier turns."""


def encode_inputs(inputs: object, template: Template, generation_prompt: bool = True) -> list[Prompt]:
    """Converts inputs to prompts, in order; long ones are left out under `truncation_strategy="delete"`.

    A single dict is one input. The prompt of an InputFeature is its `input_ids`. If it was returned by
    `new_input_feature` and messages were appended, their rendered tokens follow.

    Args:
        inputs: Trajectories or InputFeatures, one or a list, or PackedInputs.
        template: template of the call.
        generation_prompt: whether messages are rendered up to the beginning of the assistant's turn, or only up to the
            last message.

    Raises:
        PromptError: no input, inputs of several kinds, one that is neither a Trajectory nor an InputFeature, one that
            is too long, or all are left out.
    """
    items = as_list(inputs)
    if items is None:
        raise PromptError(
            f"inputs must be a Trajectory or an InputFeature, or a list of one of them, got {type(inputs).__name__}. "
            'Give text as {"messages": [{"role": "user", "content": text}]}.'
        )
    if not items:
        raise PromptError("inputs is empty. Give at least one Trajectory or InputFeature.")
    kinds = [_kind(item, i) for i, item in enumerate(items)]
    if len(set(kinds)) > 1:
        other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise PromptError(
            f"inputs mixes kinds: inputs[0] is {_article(kinds[0])}, inputs[{other}] is {_article(kinds[other])}. "
            "Send each kind in a separate call."
        )
    encode = _from_messages if kinds[0] == "messages" else _from_ids
    fitted = [_fit(encode(item, i, template, generation_prompt), template) for i, item in enumerate(items)]
    prompts = [prompt for prompt in fitted if prompt is not None]
    if not prompts:
        raise PromptError(
            f"each of the {len(items)} inputs is longer than max_length={template.max_length}, and "
            'truncation_strategy="delete" leaves them out. Raise max_length.'
        )
    return prompts


def _kind(item: object, i: int) -> str:
    if not isinstance(item, Mapping):
        raise PromptError(
            f"inputs[{i}] is {type(item).__name__}, not a Trajectory (a dict with messages) or an InputFeature "
            "(a dict with input_ids)."
        )
    kinds = [kind for kind in ("messages", "input_ids") if item.get(kind) is not None]
    # new_input_feature returns both: its tokens are continued.
    if not kinds:
        close = unknown_name("input", next(iter(item), ""), ("messages", "input_ids")).split(" Known:")[0]
        raise PromptError(
            f"inputs[{i}] has neither messages nor input_ids: {close} Its keys: {sorted(map(str, item))}."
        )
    return kinds[-1]


def _article(kind: str) -> str:
    return "a Trajectory (messages)" if kind == "messages" else "an InputFeature (input_ids)"


def _refuse_pixels(item: Mapping[str, object], where: str) -> None:
    for key in PIXELS:
        value = item.get(key)
        if value is not None and not (isinstance(value, Sequence) and not value):
            raise PromptError(f"{where}.{key}: this service samples from text only. Leave it out.")


def _tools(item: Mapping[str, object], where: str) -> list[object] | None:
    tools = item.get("tools")
    if tools is not None and (isinstance(tools, (str, bytes)) or not isinstance(tools, Sequence)):
        raise PromptError(f"{where}.tools must be a list, got {tools!r}.")
    return list(tools) if tools else None


def _from_messages(item: Mapping[str, object], index: int, template: Template, generation_prompt: bool) -> Prompt:
    where = f"inputs[{index}]"
    for key in item:
        if key not in TRAJECTORY_KEYS:
            raise PromptError(f"{where}: {unknown_name('key of a Trajectory', key, TRAJECTORY_KEYS)}.")
    _refuse_pixels(item, where)
    ids = template.encode(item["messages"], _tools(item, where), where, generation_prompt)
    return Prompt(ids, index, _opened_turn(template.opening(ids)))


def _array(value: object, where: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of several lengths; a tensor on a GPU
        raise PromptError(f"{where} is not an array of numbers: {error}") from None


def _from_ids(item: Mapping[str, object], index: int, template: Template, generation_prompt: bool) -> Prompt:
    where = f"inputs[{index}]"
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
    if ids.size and (ids.min() < 0 or (ids.dtype != np.int32 and ids.max() > MAX_ID)):
        bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise PromptError(f"{where}.input_ids contains {bad}, which is not a token id.")
    ids = ids.astype(np.int32)
    labels = _labels(item, ids, where)
    start, following = _continuation(item, ids, where, template, generation_prompt)
    whole = np.concatenate([ids, following]) if len(following) else ids
    if labels is not None:
        labels = np.concatenate([labels, np.full(len(following), IGNORED_LABEL, np.int64)])
    opening = _opening(template, whole, start)
    if start is None and labels is None:
        return Prompt(whole, index, _opened_turn(opening))
    return Prompt(whole, index, Turn(opening=opening, resumed_at=start, labels=labels))


@lru_cache(maxsize=64)
def _opened_turn(opening: str) -> Turn:
    """A turn with this opening only; cached, so that a response pickles it once for all its prompts."""
    return Turn(opening=opening)


def _opening(template: Template, ids: NDArray[np.int32], start: int | None) -> str:
    """Text of a prompt that belongs to the sampled message, whose tokens begin at `start` if it is unfinished.

    The opening of an unfinished message is before its first token.
    """
    if start is None:
        return template.opening(ids)
    return template.opening(ids[:start]) + template.decode(ids[start:])


def _labels(item: Mapping[str, object], ids: NDArray[np.int32], where: str) -> NDArray[np.int64] | None:
    """Rolls the input's labels back to the positions of their tokens. None if all are ignored."""
    if item.get("labels") is None:
        return None
    rolled = _array(item["labels"], f"{where}.labels")
    if rolled.shape != ids.shape or (rolled.size and rolled.dtype.kind not in "iu"):
        raise PromptError(
            f"{where}.labels has shape {rolled.shape} and type {rolled.dtype}, input_ids {ids.shape}. Give a whole "
            "number for each token, or leave it out."
        )
    # No token comes before the first, so nothing predicts it.
    labels = np.concatenate([[IGNORED_LABEL], rolled[:-1]]).astype(np.int64)[: len(ids)]
    return None if (labels == IGNORED_LABEL).all() else labels


def _continuation(
    item: Mapping[str, object], ids: NDArray[np.int32], where: str, template: Template, generation_prompt: bool
) -> tuple[int | None, NDArray[np.int32]]:
    """Returns (index of the first token of the unfinished message, None if it is new; token ids to append to `ids`)."""
    none = np.empty(0, np.int32)
    encoded = cast("Encoded | None", item.get("encoded"))
    if encoded is None or item.get("messages") is None:
        return None, none
    try:
        length, sums, start = encoded["ids"], list(encoded["messages"]), int(encoded["assistant_start"])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise PromptError(f"{where}.encoded was not written by new_input_feature: {encoded!r}. Leave it out.") from None
    if length != len(ids):
        return None, none
    messages = item["messages"]
    remedy = 'Pass {"messages": …} only to encode them again.'
    if not isinstance(messages, Sequence) or len(messages) < len(sums):
        count = len(messages) if isinstance(messages, Sequence) else messages
        raise PromptError(f"{where} has {count} messages, its input_ids cover {len(sums)}. {remedy}")
    for j, (message, expected) in enumerate(zip(messages, sums, strict=False)):
        if not isinstance(message, Mapping) or checksum(message) != expected:
            raise PromptError(f"{where}.messages[{j}] does not match its input_ids. {remedy}")
    sampled = 0 <= start < len(ids)
    if len(messages) == len(sums):
        return (start if sampled else None), none
    if not sampled or messages[len(sums) - 1].get("role") != "assistant":
        raise PromptError(f"{where}: its input_ids do not end with a sampled message that others can follow. {remedy}")
    return None, template.encode_after(ids, messages, len(sums), _tools(item, where), where, generation_prompt)


def _fit(prompt: Prompt, template: Template) -> Prompt | None:
    """Applies the truncation strategy to a prompt of more than `max_length` tokens; None if it is left out.

    Raises:
        PromptError: it is longer and the strategy is raise.
    """
    max_length, length = template.max_length, len(prompt.ids)
    if max_length is None or length <= max_length:
        return prompt
    if template.truncation_strategy == "delete":
        return None
    if template.truncation_strategy == "raise":
        raise PromptError(
            f"inputs[{prompt.index}] has {length} tokens, max_length is {max_length}. Shorten it, raise max_length, or "
            "set truncation_strategy to left, right or delete."
        )
    left = template.truncation_strategy == "left"
    kept = slice(length - max_length, length) if left else slice(0, max_length)
    turn, start = prompt.turn, prompt.turn.resumed_at
    ids, start = prompt.ids[kept], None if start is None else min(max(start - kept.start, 0), max_length)
    return replace(
        prompt,
        ids=ids,
        turn=replace(
            turn,
            # Text cut on the left still belongs to the message; cut on the right, the sample continues what is left.
            opening=turn.opening if left else _opening(template, ids, start),
            labels=None if turn.labels is None else turn.labels[kept],
            resumed_at=start,
        ),
    )
