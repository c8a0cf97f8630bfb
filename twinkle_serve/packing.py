"""Packs tensors into buckets, as an update of weights sends them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from twinkle_serve.data_format.weights import Bucket
from twinkle_serve.errors import WeightsError
from twinkle_serve.tensors import AnyTensor, TensorFile, count_nonfinite, gathered, is_tensor, item_bytes

BUCKET_BYTES = 256 * 2**20
PLAIN = ("Tensor", "Parameter", "ndarray")
"""Classes of tensors whose values are in their own memory."""


def buckets(
    tensors: Iterable[tuple[str, AnyTensor]],
    bucket_bytes: int = BUCKET_BYTES,
    *,
    allow_nonfinite: bool = False,
    new_file: Callable[[int], TensorFile] = TensorFile,
    writers: int = 1,
) -> Iterator[Bucket]:
    """Packs weights into buckets of about `bucket_bytes`, each of at least one tensor.

    With one writer, a tensor is copied before the next one is asked for: its memory may be used again for that one. A
    sharded tensor (DTensor) is gathered when its turn comes, so every rank of its mesh must take part.

    Args:
        new_file: makes the file of a bucket, given its expected size in bytes.
        writers: how many buckets are made at the same time, each in a thread. More than one needs tensors that
            `stay_as_they_are`.

    Raises:
        WeightsError: an item that is not a tensor or has no values, a repeated name, or values that are not finite.
    """
    capacity = int(min(bucket_bytes, BUCKET_BYTES))
    if writers > 1:
        yield from _written_together(tensors, bucket_bytes, allow_nonfinite, lambda: new_file(capacity), writers)
        return
    file = new_file(capacity)
    for name, tensor in _unique(tensors):
        whole = _readable(name, tensor, allow_nonfinite)
        if file.names and (file.size + whole.nbytes > bucket_bytes or not file.aligns(whole)):
            yield file.finish()
            file = new_file(capacity)
        _add(file, name, whole)
    if file.names:
        yield file.finish()


def stay_as_they_are(weights: object) -> bool:
    """Whether tensors have their values in memory of their own, which nobody uses for others while a call reads them:
    those of a `state_dict`, unless they are sharded or of a class that may make its values when they are read."""
    return isinstance(weights, dict) and all(type(tensor).__name__ in PLAIN for tensor in weights.values())


def _written_together(
    tensors: Iterable[tuple[str, AnyTensor]],
    bucket_bytes: int,
    allow_nonfinite: bool,
    new_file: Callable[[], TensorFile],
    writers: int,
) -> Iterator[Bucket]:
    """See `buckets`. Writing to one file takes one core, for its pages are new."""

    def write(file: TensorFile, group: list[tuple[str, AnyTensor]]) -> Bucket:
        for name, tensor in group:
            _add(file, name, _readable(name, tensor, allow_nonfinite))
        return file.finish()

    writing: deque[Future[Bucket]] = deque()
    with ThreadPoolExecutor(writers, thread_name_prefix="weights") as pool:
        try:
            for group in _groups(tensors, bucket_bytes):
                writing.append(pool.submit(write, new_file(), group))
                if len(writing) == writers:
                    yield writing.popleft().result()
            while writing:
                yield writing.popleft().result()
        finally:
            for waiting in writing:
                waiting.cancel()


def _groups(tensors: Iterable[tuple[str, AnyTensor]], bucket_bytes: int) -> Iterator[list[tuple[str, AnyTensor]]]:
    """Yields the tensors of each bucket."""
    group: list[tuple[str, AnyTensor]] = []
    size = 0
    for name, tensor in _unique(tensors):
        try:
            own_bytes, alignment = tensor.nbytes, item_bytes(tensor)
        except Exception:  # of a tensor that is refused when it is read
            own_bytes, alignment = 0, 1
        if group and (size + own_bytes > bucket_bytes or size % alignment):
            yield group
            group, size = [], 0
        group.append((name, tensor))
        size += own_bytes
    if group:
        yield group


def _unique(tensors: Iterable[tuple[str, AnyTensor]]) -> Iterator[tuple[str, AnyTensor]]:
    """Yields the pairs unchanged. Raises WeightsError for an item that is no pair, and for a repeated name."""
    names: set[str] = set()
    for name, tensor in tensors:
        if not isinstance(name, str) or not is_tensor(tensor):
            raise WeightsError(f"weights must be pairs of name and tensor, got {name!r} and {type(tensor).__name__}.")
        if name in names:
            raise WeightsError(f"weight {name!r} comes twice.")
        names.add(name)
        yield name, tensor


def _readable(name: str, tensor: AnyTensor, allow_nonfinite: bool) -> AnyTensor:
    """Returns the whole tensor; see `gathered`. Raises WeightsError for values that cannot be sent."""
    try:
        whole = gathered(tensor)
        bad = 0 if allow_nonfinite else count_nonfinite(whole)
    except ValueError as error:
        raise WeightsError(f"weight {name!r} {error}") from error
    if bad:
        raise WeightsError(
            f"weight {name!r} has {bad} values of {math.prod(whole.shape)} that are not finite. "
            "Pass allow_nonfinite=True if that is intended."
        )
    return whole


def _add(file: TensorFile, name: str, tensor: AnyTensor) -> None:
    try:
        file.add(name, tensor)
    except ValueError as error:
        raise WeightsError(f"weight {name!r} {error}") from error
