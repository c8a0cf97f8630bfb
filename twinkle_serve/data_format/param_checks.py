"""Checks of single sampling parameters. Each returns the value in Python's own type, or raises SamplingParamsError."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from twinkle_serve.errors import SamplingParamsError
from twinkle_serve.validation import finite_number, flag, one_of, whole_number

Check: TypeAlias = Callable[[str, Any], Any]
"""Takes a parameter's name and value."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
"""Below the first, logits / temperature overflows: vLLM would raise the value silently. Above the second, tokens are
about equally likely."""
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_TOKEN_ID = 2**31 - 1
MAX_DIGITS = 10

whole = partial(whole_number, error=SamplingParamsError)
real = partial(finite_number, error=SamplingParamsError)


def number(minimum: float, maximum: float, remedy: str = "") -> Check:
    """Makes a check for a number within bounds. `remedy` ends the message."""

    def check(name: str, value: Any) -> float:
        given = real(name, value)
        if not minimum <= given <= maximum:
            raise SamplingParamsError(f"{name} must be in [{minimum:g}, {maximum:g}], got {given}.{remedy}")
        return given

    return check


def integer(minimum: int, maximum: int | None = None) -> Check:
    """Makes a check for an integer within bounds."""
    return lambda name, value: whole(name, value, minimum, maximum)


def optional(check: Check) -> Check:
    """Makes a check that lets None pass."""
    return lambda name, value: None if value is None else check(name, value)


def choice(*choices: str) -> Check:
    """Makes a check for one of some strings."""
    return lambda name, value: one_of(name, value, choices, error=SamplingParamsError)


def boolean(name: str, value: Any) -> bool:
    """True or false."""
    return flag(name, value, error=SamplingParamsError)


def temperature(name: str, value: Any) -> float:
    """0, or within the bounds."""
    given = real(name, value)
    if given != 0 and not MIN_TEMPERATURE <= given <= MAX_TEMPERATURE:
        raise SamplingParamsError(
            f"{name} must be 0 (greedy) or in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}], got {given}."
        )
    return given


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A list of at least one token id, without repetitions."""
    ids = _ids(name, value)
    if len(set(ids)) < len(ids):
        twice = next(token for i, token in enumerate(ids) if token in ids[:i])
        raise SamplingParamsError(f"{name} holds token id {twice} twice. Give each once.")
    return ids


def stop_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A list of token ids, possibly empty."""
    return _ids(name, value, empty=True)


def _ids(name: str, value: Any, *, empty: bool = False) -> tuple[int, ...]:
    items = _listed(name, value, "a list of token ids", empty=empty)
    return tuple(whole(f"{name}[{i}]", item, 0, MAX_TOKEN_ID) for i, item in enumerate(items))


def words(name: str, value: Any) -> tuple[str, ...]:
    """A list of at least one text that is not empty."""
    items = _listed(name, value, "a list of strings")
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise SamplingParamsError(f"{name}[{i}] must be a string, got {item!r} ({type(item).__name__}).")
    return texts(name, items)


def texts(name: str, items: Iterable[str]) -> tuple[str, ...]:
    """Strings that are not empty and can be written as UTF-8."""
    found = tuple(map(str, items))  # of numpy's too
    for item in found:
        if not item.strip() if name == "bad_words" else not item:
            reason = "which has no token of its own" if item else "an empty string"
            raise SamplingParamsError(f"{name} must not hold {item!r}, {reason}.")
        try:
            item.encode()
        except UnicodeEncodeError:
            raise SamplingParamsError(f"{name} must be text, got half of a surrogate pair: {item!r}.") from None
    return found


def _listed(name: str, value: Any, kind: str, *, empty: bool = False) -> list[Any]:
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise SamplingParamsError(f"{name} must be {kind}, got {value!r} ({type(value).__name__}).")
    if not value and not empty:
        raise SamplingParamsError(f"{name} is empty. Give {kind}, or leave it out.")
    return list(value)


def stop(name: str, value: Any) -> tuple[str, ...] | tuple[int, ...]:
    """A string, a list of strings or a list of token ids."""
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise SamplingParamsError(
            f"{name} must be a string, a list of strings or a list of token ids, got {value!r} "
            f"({type(value).__name__})."
        )
    if any(isinstance(item, str) for item in items):
        if not all(isinstance(item, str) for item in items):
            raise SamplingParamsError(
                f"{name} must be all strings or all token ids, got both: {value!r}. Give the ids as stop_token_ids."
            )
        return texts(name, items)
    return _ids(name, items, empty=True)


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """A dict of token ids, which may be decimal text as in JSON, and numbers to add to their logits."""
    if not isinstance(value, Mapping):
        raise SamplingParamsError(
            f"{name} must be a dict of token ids and numbers, got {value!r} ({type(value).__name__})."
        )
    if not value:
        raise SamplingParamsError(f"{name} is empty. Give a dict of token ids and numbers, or leave it out.")
    bound = number(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, " To exclude a token, use bad_words or allowed_token_ids.")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= MAX_DIGITS:
            key = int(key)
        token = whole(f"a key of {name}", key, 0, MAX_TOKEN_ID)
        if token in biases:
            raise SamplingParamsError(f"{name} holds token id {token} twice. Give each once.")
        biases[token] = bound(f"{name}[{token}]", bias)
    return biases
