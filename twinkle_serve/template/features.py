"""Validates the columns of an InputFeature."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.columns import IGNORED_LABEL, OWN_COLUMNS, TYPE_COLUMNS, is_media
from twinkle_serve.data_format.plain import as_items, is_absent
from twinkle_serve.data_format.token_lists import MAX_ID
from twinkle_serve.data_format.weights import SampledSpan
from twinkle_serve.errors import PromptError
from twinkle_serve.validation import whole_number

NOT_COLUMNS = OWN_COLUMNS | {"messages", "tools", "user_data"}
"""Keys that are read, or are the caller's own, whatever their length."""


def refuse_media(item: Mapping[str, object], where: str) -> None:
    """Raises PromptError if an input has images, videos or audio."""
    for key, value in item.items():
        if is_media(key) and not is_absent(value):
            raise PromptError(
                f"{where}.{key}: this service samples from text only. Leave it out, or put it into user_data."
            )


def array_of(value: object, where: str) -> NDArray[Any]:
    """Converts a column to an array.

    Raises:
        PromptError: it is not an array of numbers.
    """
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of several lengths; a tensor on a GPU
        raise PromptError(f"{where} is not an array of numbers: {error}") from None


def ids_of(item: Mapping[str, object], where: str) -> NDArray[np.int32]:
    """Returns `input_ids`, shape [P], after checking it and the other columns except those about sampled tokens.

    Raises:
        PromptError: not token ids, a padded prompt, or a column that cannot be made as long as prompt and sample.
    """
    ids = array_of(item["input_ids"], f"{where}.input_ids")
    if ids.size and ids.dtype.kind not in "iu":
        raise PromptError(f"{where}.input_ids must be whole numbers, got {ids.dtype}.")
    if ids.ndim != 1:
        raise PromptError(
            f"{where}.input_ids must have one dimension, got shape {ids.shape}. Send each row as an InputFeature."
        )
    _check_attention(item, ids, where)
    if ids.size and (ids.min() < 0 or (ids.dtype != np.int32 and ids.max() > MAX_ID)):
        bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise PromptError(f"{where}.input_ids contains {bad}, which is not a token id.")
    _check_derived(item, len(ids), where)
    _check_length(item, len(ids), where)
    refuse_values_of_tokens(item, len(ids), where)
    return ids.astype(np.int32)


def labels_of(item: Mapping[str, object], ids: NDArray[np.int32], where: str) -> NDArray[np.int64] | None:
    """Rolls the input's labels back to the positions of their tokens. None if all are ignored.

    Raises:
        PromptError: not a whole number for each token.
    """
    if is_absent(item.get("labels")):
        return None
    rolled = array_of(item["labels"], f"{where}.labels")
    if rolled.shape != ids.shape or (rolled.size and rolled.dtype.kind not in "iu"):
        raise PromptError(
            f"{where}.labels has shape {rolled.shape} and type {rolled.dtype}, input_ids {ids.shape}. Give a whole "
            "number for each token, or leave it out."
        )
    if rolled.size and rolled[-1] != IGNORED_LABEL:
        raise PromptError(
            f"{where}.labels ends with {rolled[-1]}, and no token follows the last one: it must be {IGNORED_LABEL}. "
            "Roll labels left by one, or leave them out."
        )
    # No token comes before the first, so nothing predicts it.
    labels = np.concatenate([[IGNORED_LABEL], rolled[:-1]]).astype(np.int64)[: len(ids)]
    return None if (labels == IGNORED_LABEL).all() else labels


def logprobs_of(
    item: Mapping[str, object], labels: NDArray[np.int64] | None, length: int, where: str
) -> NDArray[np.float64] | None:
    """Rolls the input's logprobs back to the positions of their tokens, 0.0 where there is no label. None if absent.

    Args:
        labels: labels at the positions of their tokens; None if all are ignored.

    Raises:
        PromptError: not a finite number for each token.
    """
    if is_absent(item.get("logprobs")):
        return None
    rolled = finite_logprobs(item["logprobs"], length, where)
    if labels is None:
        return np.zeros(length)
    if rolled[-1] != 0:
        raise PromptError(
            f"{where}.logprobs ends with {rolled[-1]}, and no token follows the last one: it must be 0. Roll logprobs "
            "left by one, as labels, or leave them out."
        )
    return np.where(labels == IGNORED_LABEL, 0.0, np.concatenate([[0.0], rolled[:-1]]))


def finite_logprobs(column: object, length: int, where: str) -> NDArray[np.float64]:
    """Returns a column of logprobs as an array.

    Raises:
        PromptError: not a finite number for each token.
    """
    logprobs = array_of(column, f"{where}.logprobs")
    if logprobs.shape != (length,) or logprobs.dtype.kind not in "fiu":
        raise PromptError(
            f"{where}.logprobs has shape {logprobs.shape} and type {logprobs.dtype}, input_ids ({length},). Give a "
            "number for each token, 0 where it is unknown, or leave it out."
        )
    if not np.isfinite(logprobs).all():
        at = int(np.flatnonzero(~np.isfinite(logprobs))[0])
        raise PromptError(
            f"{where}.logprobs has {logprobs[at]} at index {at}, and must be finite. Give 0 where it is unknown, or "
            "leave it out."
        )
    return logprobs.astype(np.float64)


def spans_of(item: Mapping[str, object], length: int, where: str) -> tuple[SampledSpan, ...]:
    """Returns the input's `weight_versions`, of the tokens that are there: callers take tokens away at the end.

    Raises:
        PromptError: `new_input_feature` cannot have written them.
    """
    given, name = item.get("weight_versions"), f"{where}.weight_versions"
    if is_absent(given):
        return ()
    spans = [_span(span, name) for span in as_items(given) or [given]]
    for before, span in itertools.pairwise(spans):
        if span["start"] < before["end"]:
            raise PromptError(
                f"{name} has a span that ends at {before['end']} before one that starts at {span['start']}. Put them "
                "in order, without overlaps, or leave it out."
            )
    return tuple(cut_spans(spans, slice(0, length)))


def _span(span: object, name: str) -> SampledSpan:
    if not isinstance(span, Mapping) or not all(isinstance(span.get(key), str) for key in ("weights", "adapter")):
        raise PromptError(f"{name} was not written by new_input_feature: {span!r:.80}. Leave it out.")
    start = whole_number(f"{name}: start", span.get("start"), 0, error=PromptError)
    end = whole_number(f"{name}: end", span.get("end"), start, error=PromptError)
    return SampledSpan(weights=str(span["weights"]), adapter=str(span["adapter"]), start=start, end=end)


def cut_spans(spans: Iterable[SampledSpan], kept: slice) -> list[SampledSpan]:
    """Returns the parts of spans that are left when only the tokens in `kept` are."""
    cut = []
    for span in spans:
        start, end = max(span["start"], kept.start), min(span["end"], kept.stop)
        if start < end:
            moved = SampledSpan(**{**span, "start": start - kept.start, "end": end - kept.start})
            cut.append(moved)
    return cut


def _check_attention(item: Mapping[str, object], ids: NDArray[Any], where: str) -> None:
    if is_absent(item.get("attention_mask")):
        return
    mask = array_of(item["attention_mask"], f"{where}.attention_mask")
    if mask.shape != ids.shape:
        raise PromptError(f"{where}.attention_mask has shape {mask.shape}, input_ids {ids.shape}. Leave it out.")
    if hidden := int((mask == 0).sum()):
        raise PromptError(f"{where}.attention_mask hides {hidden} of {len(ids)} tokens. Send input_ids unpadded.")
    if not (mask == 1).all():
        other = mask[mask != 1][0]
        raise PromptError(f"{where}.attention_mask must be 1 for each token, got {other}. Leave it out.")


def _check_derived(item: Mapping[str, object], length: int, where: str) -> None:
    """Checks position ids and token types, in any number of rows: engines compute with those of plain text."""
    for key in ("position_ids", *TYPE_COLUMNS):
        value = item.get(key)
        if is_absent(value) or (type(value) is list and value == list(range(length)) and key == "position_ids"):
            continue  # a list is not converted: it would take longer than all else here
        column = array_of(value, f"{where}.{key}")
        if column.ndim == 0 or column.shape[-1] != length:
            raise PromptError(f"{where}.{key} has shape {column.shape}, input_ids ({length},). Leave it out.")
        expected, rule = (np.arange(length), f"0 to {length - 1}") if key == "position_ids" else (0, "0, for text")
        if not (column == expected).all():
            raise PromptError(f"{where}.{key} must be {rule}: this service samples from text only. Leave it out.")


def _check_length(item: Mapping[str, object], length: int, where: str) -> None:
    given = item.get("length")
    if not is_absent(given) and not np.array_equal(array_of(given, f"{where}.length").ravel(), [length]):
        raise PromptError(f"{where}.length is {given!r:.80}, input_ids has {length} tokens. Leave it out.")


def refuse_values_of_tokens(item: Mapping[str, object], length: int, where: str) -> None:
    """Refuses unknown columns with a number for each token, which a sample would leave too short.

    They have a dimension of about as many numbers as there are tokens: one more or less, as shifted columns have.
    """
    for key, value in item.items():
        if key in NOT_COLUMNS:
            continue
        try:
            sizes = sorted(size for size in _sizes(value) or () if abs(size - length) <= 1)
        except RecursionError:  # a list that contains itself is no array
            continue
        if sizes:
            size = length if length in sizes else sizes[0]
            raise PromptError(
                f"{where}.{key} has a dimension of {size} numbers, and input_ids {length} tokens: a value for each "
                "token is not known for the sampled ones. Leave it out, or put it into user_data."
            )


def _sizes(value: object) -> set[int] | None:
    """Sizes of the dimensions of an array, a list or the lists in a dict; None if there are no numbers in it."""
    if isinstance(value, Mapping):
        return _joined(map(_sizes, value.values()))
    shape, kind = getattr(value, "shape", None), getattr(getattr(value, "dtype", None), "kind", "f")
    if isinstance(shape, tuple) and kind not in "OSTU":
        return {int(size) for size in shape}
    items = as_items(value)
    if items is None:
        return set() if isinstance(value, (int, float)) else None
    inner = _joined(map(_sizes, items))
    return None if inner is None else inner | {len(items)}


def _joined(sizes: Iterable[set[int] | None]) -> set[int] | None:
    known = [size for size in sizes if size is not None]
    return set().union(*known) if known else None
