"""Validators of arguments, shared by all layers. Each returns the value in Python's own type, or raises."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TypeVar

from twinkle_serve.errors import RequestError, TwinkleServeError

Choice = TypeVar("Choice", bound=str)


def whole_number(
    name: str,
    value: object,
    minimum: int,
    maximum: int | None = None,
    *,
    error: type[TwinkleServeError] = RequestError,
) -> int:
    """An integer within bounds; numpy's integers are accepted, booleans are not.

    Raises:
        TwinkleServeError: another type, or out of bounds. Of type `error`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise error(f"{name} must be a whole number, got {value!r} ({type(value).__name__}).") from None
    if number < minimum or (maximum is not None and number > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise error(f"{name} must be {bounds}, got {number}.")
    return number


def finite_number(name: str, value: object, *, error: type[TwinkleServeError] = RequestError) -> float:
    """A finite number; numpy's numbers are accepted, booleans and text are not.

    Raises:
        TwinkleServeError: another type, NaN or infinite. Of type `error`.
    """
    try:
        if isinstance(value, (bool, str, bytes)) or getattr(value, "ndim", 0) != 0:
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise error(f"{name} must be a number, got {value!r} ({type(value).__name__}).") from None
    if not math.isfinite(number):
        raise error(f"{name} must be finite, got {number}.")
    return number


def positive(name: str, value: object, *, what: str = "a number", maximum: float | None = None) -> float:
    """A finite number above 0, and at most `maximum`. `what` is the word for it in the message.

    Raises:
        RequestError: another type, or out of bounds.
    """
    highest = math.inf if maximum is None else maximum
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= highest or value == math.inf:
        bound = "" if maximum is None else f", at most {maximum:g}"
        raise RequestError(f"{name} must be {what} above 0{bound}, got {value!r}.")
    return float(value)


def seconds(name: str, value: object, *, maximum: float | None = None) -> float:
    """A duration above 0, and at most `maximum`, seconds.

    Raises:
        RequestError: another type, or out of bounds.
    """
    return positive(name, value, what="a number of seconds", maximum=maximum)


def flag(name: str, value: object, *, error: type[TwinkleServeError] = RequestError) -> bool:
    """True or false; numbers and text are not accepted.

    Raises:
        TwinkleServeError: another type. Of type `error`.
    """
    if not isinstance(value, bool):
        raise error(f"{name} must be true or false, got {value!r}.")
    return value


def one_of(
    name: str, value: object, choices: Sequence[Choice], *, error: type[TwinkleServeError] = RequestError
) -> Choice:
    """One of the strings in `choices`.

    Raises:
        TwinkleServeError: any other value. Of type `error`.
    """
    for choice in choices:
        if value == choice:
            return choice
    raise error(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
