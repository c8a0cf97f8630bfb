"""Lists of token ids on their way between callers and routers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.plain import as_items, shown
from twinkle_serve.errors import PromptError
from twinkle_serve.validation import whole_number

MAX_ID = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, slots=True, eq=False)
class TokenLists(Sequence[list[int]]):
    """Lists of token ids, held and pickled as one array.

    A million ids in lists take 25 ms to pickle and 150 ms to unpickle, and other threads wait meanwhile.
    """

    ids: NDArray[np.int32]
    """The lists one after the other, shape [T]."""
    ends: NDArray[np.int64]
    """Where each list ends in `ids`, shape [number of lists]."""

    @classmethod
    def of(cls, lists: Sequence[NDArray[np.int32]]) -> TokenLists:
        """Joins lists."""
        ids = np.concatenate([*lists, np.empty(0, np.int32)])
        return cls(ids, np.cumsum([len(ids) for ids in lists], dtype=np.int64))

    @property
    def lengths(self) -> list[int]:
        """Number of ids in each list."""
        lengths: list[int] = np.diff(self.ends, prepend=0).tolist()
        return lengths

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids: list[int] = self.array(index).tolist()
        return ids

    def array(self, index: int) -> NDArray[np.int32]:
        """Returns one list as an array."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"list {index} of {len(self)}")
        index %= len(self)
        return self.ids[self.ends[index - 1] if index else 0 : self.ends[index]]


def read_token_ids(value: object, max_id: int = MAX_ID) -> tuple[list[NDArray[np.int32]], bool]:
    """Reads a list of token ids, or several: lists, arrays and tensors on the CPU.

    Returns:
        The lists, and whether `value` is one list by itself. An empty list is one.

    Raises:
        PromptError: it is neither, or holds something else than ids from 0 to `max_id`.
    """
    if isinstance(value, TokenLists):
        rows: list[Any] = [value.array(i) for i in range(len(value))]
    elif _dimensions(value) == 1:
        return [_checked(value, "token_ids", max_id)], True
    else:
        array = None if _dimensions(value) is None else _as_array(value)
        items = as_items(value) if array is None else as_items(array)
        if items is None:
            raise PromptError(f"token_ids must be a list of token ids, or a list of such lists, got {shown(value)}.")
        if array is None and not (items and _is_list(items[0])):
            return [_checked(items, "token_ids", max_id)], True
        rows = items
    return [_checked(row, f"token_ids[{i}]", max_id) for i, row in enumerate(rows)], False


def _dimensions(value: object) -> int | None:
    """Number of dimensions of an array or a tensor of numbers; None of other values."""
    dimensions = getattr(value, "ndim", None)
    return dimensions if isinstance(dimensions, int) and getattr(value, "dtype", None) != np.dtype(object) else None


def _is_list(value: object) -> bool:
    return bool(_dimensions(value)) or as_items(value) is not None


def _as_array(value: object) -> NDArray[Any] | None:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError):  # rows of several lengths; a tensor on a GPU
        return None


def _checked(row: object, where: str, max_id: int) -> NDArray[np.int32]:
    """
    Raises:
        PromptError: a row is not a list of ids from 0 to `max_id`.
    """
    array = _as_array(row)
    if array is not None and array.ndim == 1 and not _has_flags(row):
        if not array.size:
            return np.empty(0, np.int32)
        if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= max_id:
            return array.astype(np.int32)
    items = as_items(row) if array is None or not hasattr(row, "dtype") else as_items(array.tolist())
    for i, item in enumerate(items or ()):
        whole_number(f"{where}[{i}]", item, 0, max_id, error=PromptError)
    raise PromptError(f"{where} must be a list of token ids, got {shown(row)}.")


def _has_flags(row: object) -> bool:
    """Whether a list has true or false among its ids, which numpy takes for 1 and 0."""
    return isinstance(row, (list, tuple)) and not {bool, np.bool_}.isdisjoint(map(type, row))
