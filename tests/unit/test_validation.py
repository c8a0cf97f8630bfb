"""Validators of arguments: accepted values, and messages with the name, the value and the bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from twinkle_serve.errors import MeshError, RequestError
from twinkle_serve.validation import finite_number, one_of, positive, seconds, whole_number


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: whole_number("n", 1.0, 0), r"n must be a whole number, got 1\.0 \(float\)"),
        (lambda: whole_number("n", True, 0), r"n must be a whole number, got True \(bool\)"),
        (lambda: whole_number("n", 0, 1), "n must be at least 1, got 0"),
        (lambda: whole_number("n", 5, 1, 4), "n must be between 1 and 4, got 5"),
        (lambda: finite_number("x", "1"), r"x must be a number, got '1' \(str\)"),
        (lambda: finite_number("x", float("nan")), "x must be finite, got nan"),
        (lambda: positive("bytes", 0), "bytes must be a number above 0, got 0"),
        (lambda: seconds("timeout_s", float("inf")), "timeout_s must be a number of seconds above 0, got inf"),
        (lambda: seconds("timeout_s", float("nan")), "timeout_s must be a number of seconds above 0, got nan"),
        (lambda: seconds("timeout_s", "5"), "timeout_s must be a number of seconds above 0, got '5'"),
        (lambda: seconds("timeout_s", True), "timeout_s must be a number of seconds above 0, got True"),
        (lambda: seconds("lease_s", 61, maximum=60), "lease_s must be a number of seconds above 0, at most 60, got 61"),
        (lambda: one_of("mode", "stop", ("keep", "wait")), "mode must be one of keep, wait, got 'stop'"),
    ],
)
def test_invalid_value_is_refused(call: Any, message: str) -> None:
    """With its name, its value and the bounds."""
    with pytest.raises(RequestError, match=message):
        call()


def test_valid_value_is_returned_in_pythons_own_type() -> None:
    """Also of numpy's types."""
    assert type(whole_number("n", np.int64(3), 1, 3)) is int
    assert type(finite_number("x", np.float32(0.5))) is float
    assert seconds("timeout_s", 2, maximum=2) == 2.0
    assert one_of("mode", "wait", ("keep", "wait")) == "wait"


def test_error_type_is_the_callers() -> None:
    """RequestError is only the default."""
    with pytest.raises(MeshError):
        whole_number("dp_size", 0, 1, error=MeshError)
