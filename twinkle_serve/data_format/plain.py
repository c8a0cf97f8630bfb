"""Inputs in plain Python types, whichever library they come from: numpy, Arrow, pandas, torch."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PLAIN = (str, int, float, bool, type(None))


def plain(value: object) -> Any:
    """Copies a value: mappings become dicts, sequences and arrays lists, scalars and text Python's own types."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, str):  # of numpy, or of an enum
        return str.__str__(value)
    if (arrow := _from_arrow(value)) is not value:
        return plain(arrow)
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item) for item in value]
    return copy.deepcopy(value)


def _key(key: object) -> Any:
    copied = plain(key)
    return key if isinstance(copied, (list, dict)) else copied  # a tuple, of which a list would be no key


def as_items(value: object) -> list[Any] | None:
    """Returns the items of a list, tuple, array or Arrow list; None for text, mappings and other values."""
    value = _from_arrow(value)
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim else None
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return list(value)
    return None


def is_absent(value: object) -> bool:
    """Whether a value stands for none: None, NaN, pandas' NA, something empty, or a container of nulls only.

    Columnar formats fill missing keys with these.
    """
    if isinstance(value, (str, bytes, bytearray)):
        return not value
    try:
        return _is_null(value) or (isinstance(value, Mapping) and not value)
    except RecursionError:
        return False


def _is_null(value: object) -> bool:
    if value is None or isinstance(value, (float, np.floating)):
        return value is None or value != value
    if isinstance(value, (list, tuple)):
        return all(map(_is_null, value))
    value = _from_arrow(value)
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_null, value.values()))
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and not _holds_objects(value):
        return 0 in shape
    items = as_items(value)
    if items is not None:
        return all(map(_is_null, items))
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def without_nulls(value: Any) -> Any:
    """Removes the keys whose value is None from plain dicts, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def shown(value: object) -> str:
    """Short text of a value and its type, for messages of errors."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _holds_objects(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "O"


def _from_arrow(value: object) -> object:
    """Converts a scalar or an array of Arrow; returns other values unchanged."""
    for name in ("as_py", "to_pylist"):
        if callable(convert := getattr(value, name, None)):
            return convert()
    return value
