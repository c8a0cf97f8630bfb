"""Rows as they come out of a columnar file: arrays for lists, and the keys of all structs in each."""

from __future__ import annotations

from typing import Any

import numpy as np


def columnar(value: Any) -> Any:
    """A value as pandas reads it from Parquet: lists are numpy arrays, and dicts of a list have the same keys."""
    if isinstance(value, dict):
        return {key: columnar(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    items = [columnar(item) for item in _united(value)]
    if items and all(type(item) in (int, float) for item in items):
        return np.array(items)
    array = np.empty(len(items), object)
    array[:] = items
    return array


def _united(values: list[Any]) -> list[Any]:
    """Gives each dict the keys of all, at every depth."""
    dicts = [value for value in values if isinstance(value, dict)]
    if not dicts or len(dicts) < len(values):
        return values
    keys = dict.fromkeys(key for value in dicts for key in value)
    rows: list[dict[str, Any]] = [{} for _ in dicts]
    for key in keys:
        column = [value.get(key) for value in dicts]
        present = [item for item in column if item is not None]
        if present and all(isinstance(item, dict) for item in present):
            united = iter(_united(present))
            column = [None if item is None else next(united) for item in column]
        for row, item in zip(rows, column, strict=True):
            row[key] = item
    return rows
