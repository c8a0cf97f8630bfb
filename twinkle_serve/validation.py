"""Checks of values that callers pass in."""

from __future__ import annotations

from twinkle_serve.errors import RequestError


def seconds(name: str, value: object) -> float:
    """Returns a positive, finite number of seconds.

    Raises:
        RequestError: any other value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise RequestError(f"{name} must be a number of seconds above 0, got {value!r}.")
    return float(value)
