"""A workaround for numpy 1.26 in the client. To be removed when the lower bound of numpy in pyproject.toml is 2."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np


def read_arrays_of_numpy2() -> None:
    """Lets numpy 1.26 unpickle arrays that a service on numpy 2 sends.

    Pickle protocol 5 names `numpy._core.numeric`. numpy 1.26 has stand-ins for the modules of numpy 2 that older
    protocols name, and none for this one.
    """
    if np.__version__.startswith("1."):
        sys.modules.setdefault("numpy._core.numeric", import_module("numpy.core.numeric"))
