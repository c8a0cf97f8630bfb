"""Keeps engines in this process from writing among the results of a command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

SETTINGS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
"""Environment of engines and their processes, unless set."""


@contextlib.contextmanager
def quiet_engines() -> Iterator[None]:
    """Runs a block in which engines are started: they log errors alone, and what they print goes to stderr."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from transformers.utils import logging

    logging.disable_progress_bar()
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
