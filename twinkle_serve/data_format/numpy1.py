"""Workaround for numpy 1.26 in the client. Remove it when pyproject.toml requires numpy 2."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np


def read_arrays_of_numpy2() -> None:
    """Lets numpy 1.26 unpickle arrays from a service on numpy 2.

    Arrays in pickle protocol 5 refer to `numpy._core.numeric`. numpy 1.26 has aliases for the modules that older
    protocols refer to, but not for this one.
    """
    if np.__version__.startswith("1."):
        sys.modules.setdefault("numpy._core.numeric", import_module("numpy.core.numeric"))
