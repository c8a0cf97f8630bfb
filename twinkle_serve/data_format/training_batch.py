"""Samples of a response as tensors for a trainer. torch is imported only where its tensors are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypedDict, cast, get_args

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.columns import IGNORED_LABEL
from twinkle_serve.data_format.features import prompt_of, sampled_spans
from twinkle_serve.data_format.messages import Turn
from twinkle_serve.data_format.plain import as_items, is_absent
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.data_format.sequence import SampledSequence
from twinkle_serve.data_format.weights import SampledSpan
from twinkle_serve.errors import RequestError
from twinkle_serve.validation import flag, one_of, whole_number

if TYPE_CHECKING:
    from twinkle_serve.data_format.response import SampleResponse

TensorLibrary: TypeAlias = Literal["torch", "numpy"]
"""Library of a batch's tensors."""

TENSOR_LIBRARIES: tuple[TensorLibrary, ...] = get_args(TensorLibrary)

Tensor: TypeAlias = Any
"""A torch tensor on the CPU, or a numpy array."""

Array: TypeAlias = NDArray[Any]


class TrainingBatch(TypedDict, total=False):
    """B samples with their prompts: padded rows of L tokens, or one packed row. L is the longest sample padded, the sum
    of all packed, in both rounded up to `pad_to_multiple_of`. Shape [B, L]; packed [1, L].
    """

    input_ids: Tensor
    """Token ids, `pad_token_id` in the padding. int64."""
    labels: Tensor
    """Token to predict at each position (rolled left by one), IGNORED_LABEL for none. int64."""
    loss_mask: Tensor
    """Whether a position has a label. bool."""
    logprobs: Tensor
    """Log p of each label, nats, under `SampleResponse.logprobs_mode`; 0.0 where there is no label or its logprob is
    unknown. float32. Missing if no sample and no earlier turn has logprobs."""
    position_ids: Tensor
    """0, 1, … in each sample. Padded rows count on through the padding; packed, it counts from 0 again. int64."""
    attention_mask: Tensor
    """Padded only. 1 for tokens, 0 for padding. int64. A packed row has none: a mask cannot say where samples end."""
    cu_seqlens: Tensor
    """Packed only. Index of the first token of each sample, and L: shape [B + 1], int32. Padding is one more sequence
    at the end, so that kernels cover the whole row: shape [B + 2] then."""
    sequence_ids: Tensor
    """Packed only. Row of the sample that each token is of, −1 for padding. int64."""
    prompt_indices: list[int]
    """Index in the call of the prompt of each sample. B of them."""
    weight_versions: list[list[SampledSpan]]
    """The sampled tokens of each sample and its earlier turns, by the weights that sampled them; indices count from the
    first token of the prompt. B of them."""
    adapters: list[str]
    """`name@version` of the adapter that sampled each sample; "" for the base model. B of them."""
    seeds: list[int | None]
    """Seed of each sample, None without one. B of them."""
    stop_reasons: list[StopReason]
    """Why each sample ended. B of them."""


class _Row(NamedTuple):
    """Columns of one sample before they are rolled, in parts that follow each other."""

    ids: tuple[Array, ...]
    labels: tuple[Array, ...]
    logprobs: tuple[Array, ...] | None
    spans: list[SampledSpan]

    def __len__(self) -> int:
        return sum(map(len, self.ids))


def build_batch(
    responses: Sequence[SampleResponse],
    *,
    packed: bool,
    pad_to_multiple_of: int | None,
    max_length: int | None,
    pad_token_id: int,
    tensors: TensorLibrary,
) -> TrainingBatch:
    """See `SampleResponse.to_training_batch`.

    Args:
        responses: responses whose samples follow each other in the batch.
    """
    flag("packed", packed)
    one_of("tensors", tensors, TENSOR_LIBRARIES)
    whole_number("pad_token_id", pad_token_id, 0)
    multiple = 1 if pad_to_multiple_of is None else whole_number("pad_to_multiple_of", pad_to_multiple_of, 1)
    samples = [(sequence, response) for response in responses for sequence in response.sequences]
    _check_modes(sequence for sequence, _ in samples)
    rows = [_row(sequence, response) for sequence, response in samples]
    lengths = np.array([len(row) for row in rows], np.int64)
    _check_lengths(lengths, max_length)
    inside, arrays = _packed(lengths, multiple) if packed else _padded(lengths, multiple)
    fills = {"input_ids": pad_token_id, "labels": IGNORED_LABEL, "logprobs": 0.0}
    for name, flat in _flat_columns(rows, lengths).items():
        arrays[name] = np.full(inside.shape, fills[name], flat.dtype)
        arrays[name][inside] = flat
    arrays["loss_mask"] = arrays["labels"] != IGNORED_LABEL
    sequences = [sequence for sequence, _ in samples]
    about_samples = {
        "prompt_indices": [sequence.prompt_index for sequence in sequences],
        "weight_versions": [row.spans for row in rows],
        "adapters": [sequence.adapter for sequence in sequences],
        "seeds": [sequence.seed for sequence in sequences],
        "stop_reasons": [sequence.stop_reason for sequence in sequences],
    }
    return cast(TrainingBatch, (_as_torch(arrays) if tensors == "torch" else arrays) | about_samples)


def _check_modes(samples: Iterable[SampledSequence]) -> None:
    """Refuses logprobs of several distributions, which one column would mix."""
    responses = (getattr(sample, "response", None) for sample in samples if sample.logprob_array is not None)
    modes = {response.logprobs_mode for response in responses if response is not None and response.logprobs_mode}
    if len(modes) > 1:
        raise RequestError(f"the samples have {' and '.join(sorted(modes))}. Make a batch of each.")


def _check_lengths(lengths: NDArray[np.int64], max_length: int | None) -> None:
    if max_length is None:
        return
    whole_number("max_length", max_length, 1)
    if lengths.max(initial=0) > max_length:
        longest = int(lengths.argmax())
        raise RequestError(
            f"sequences[{longest}] has {lengths[longest]} tokens with its prompt, max_length is {max_length}. Raise "
            "max_length, lower max_tokens, or leave the sample out: none is cut."
        )


def _flat_columns(rows: Sequence[_Row], lengths: NDArray[np.int64]) -> dict[str, Array]:
    """Returns the columns of all samples, one after the other. Shape [sum of lengths] each."""
    ends = np.cumsum(lengths)
    labels = _rolled(_joined((row.labels for row in rows), np.int64), ends, IGNORED_LABEL)
    columns = {"input_ids": _joined((row.ids for row in rows), np.int64), "labels": labels}
    if any(row.logprobs is not None for row in rows):
        parts = (row.logprobs or (np.zeros(len(row), np.float32),) for row in rows)
        logprobs = _rolled(_joined(parts, np.float32), ends, 0.0)
        columns["logprobs"] = np.where(labels == IGNORED_LABEL, np.float32(0), logprobs)
    return columns


def _joined(parts: Iterable[Sequence[Array]], dtype: type[np.generic]) -> Array:
    return np.concatenate([np.empty(0, dtype), *(array for arrays in parts for array in arrays)], dtype=dtype)


def _rolled(flat: Array, ends: NDArray[np.int64], fill: float) -> Array:
    """Moves the values of each row left by one; `fill` follows the last."""
    rolled = np.append(flat[1:], flat[:1])
    rolled[ends - 1] = fill
    return rolled


def _padded(lengths: NDArray[np.int64], multiple: int) -> tuple[NDArray[np.bool_], dict[str, Array]]:
    """Returns where tokens are in padded rows, and the columns that follow from it."""
    places = np.arange(_round_up(int(lengths.max(initial=0)), multiple))
    inside = places < lengths[:, None]
    # Counted on through the padding: to transformers, a single row that begins again holds several sequences.
    position_ids = np.tile(places, (len(lengths), 1))
    return inside, {"position_ids": position_ids, "attention_mask": inside.astype(np.int64)}


def _packed(lengths: NDArray[np.int64], multiple: int) -> tuple[NDArray[np.bool_], dict[str, Array]]:
    """Returns where tokens are in a packed row, and the columns that follow from it."""
    total = int(lengths.sum())
    padding = _round_up(total, multiple) - total
    spans = np.append(lengths, padding) if padding else lengths
    ends = np.cumsum(spans)
    places = np.arange(total + padding)
    sequence_ids = np.repeat(np.arange(len(lengths)), lengths)
    arrays: dict[str, Array] = {
        "position_ids": (places - np.repeat(ends - spans, spans))[None],
        "cu_seqlens": np.concatenate([[0], ends]).astype(np.int32),
        "sequence_ids": np.append(sequence_ids, np.full(padding, -1))[None],
    }
    return (places < total)[None], arrays


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _as_torch(arrays: Mapping[str, Array]) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise RequestError('tensors="torch" needs torch, which is not installed here. Pass tensors="numpy".') from None
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _row(sequence: SampledSequence, response: SampleResponse) -> _Row:
    """Returns the columns of a sample in `response`."""
    if hasattr(sequence, "response"):
        return _continued(sequence, *prompt_of(sequence))
    feature = sequence.new_input_feature
    if isinstance(feature, Mapping) and not is_absent(feature.get("input_ids")):
        return _given(sequence, feature)
    prompt = response.prompts[0]
    if not len(prompt):
        raise RequestError(
            "a sample made by hand has no prompt, and so no position at which its first token is predicted. Give its "
            "response prompt_token_ids, or the sample new_input_feature."
        )
    return _continued(sequence, prompt, Turn())


def _continued(sequence: SampledSequence, prompt: NDArray[np.int32], turn: Turn) -> _Row:
    """Returns the columns of a sample after its prompt."""
    tokens, sampled = sequence.token_array, sequence.logprob_array
    labels = np.full(len(prompt), IGNORED_LABEL) if turn.labels is None else turn.labels
    logprobs = None
    if sampled is not None or turn.logprobs is not None:
        earlier = np.zeros(len(prompt), np.float32) if turn.logprobs is None else turn.logprobs
        logprobs = (earlier, np.zeros(len(tokens), np.float32) if sampled is None else sampled)
    return _Row((prompt, tokens), (labels, tokens), logprobs, sampled_spans(sequence, turn, len(prompt)))


def _given(sequence: SampledSequence, feature: Mapping[str, Any]) -> _Row:
    """Returns the columns of a sample made by hand with an input feature.

    Raises:
        RequestError: a column is invalid, or the feature does not end with the sample's tokens.
    """
    ids, tokens, sampled = _column(feature, "input_ids", "iu"), sequence.token_array, sequence.logprob_array
    start = len(ids) - len(tokens)
    if start < 0 or not np.array_equal(ids[start:], tokens):
        raise RequestError("new_input_feature of a sample made by hand does not end with the sample's tokens.")
    labels: Array = np.append(np.full(start, IGNORED_LABEL), tokens)
    if not is_absent(feature.get("labels")):
        labels = _unrolled(_column(feature, "labels", "iu", len(ids)).astype(np.int64), IGNORED_LABEL)
    logprobs: Array | None = None
    if not is_absent(feature.get("logprobs")):
        logprobs = _unrolled(_column(feature, "logprobs", "fiu", len(ids)), 0.0)
    elif sampled is not None:
        logprobs = np.append(np.zeros(start, np.float32), sampled)
    spans = as_items(feature.get("weight_versions")) or sampled_spans(sequence, Turn(), start)
    return _Row((ids,), (labels,), None if logprobs is None else (logprobs,), spans)


def _unrolled(column: Array, fill: float) -> Array:
    """Moves the values of a column right by one, to the positions of their tokens."""
    return np.concatenate([[fill], column[:-1]])[: len(column)]


def _column(feature: Mapping[str, Any], name: str, kinds: str, length: int | None = None) -> Array:
    """Returns a column of a feature made by hand.

    Args:
        kinds: kinds of numpy's dtypes that it may have.
        length: the number of values that it must have.
    """
    try:
        column = np.asarray(feature[name])
    except (TypeError, ValueError, RuntimeError) as error:  # rows of several lengths; a tensor on a GPU
        raise RequestError(f"new_input_feature[{name!r}] is not an array of numbers: {error}") from None
    if column.ndim != 1 or column.dtype.kind not in kinds or len(column) != (len(column) if length is None else length):
        expected = "one dimension of whole numbers" if length is None else f"a number for each of its {length} tokens"
        raise RequestError(
            f"new_input_feature[{name!r}] of a sample made by hand has shape {column.shape} and type {column.dtype}. "
            f"It must have {expected}."
        )
    return column
