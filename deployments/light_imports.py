"""Imports of processes that need tokenizers and no models."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec

from twinkle_serve.collection import no_collection

ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def import_transformers_without_torch() -> None:
    """Imports transformers as if torch were not installed: it then has tokenizers and templates, and no models.

    With torch a router holds 400 MiB more and starts 8 s later on a slow core. torch itself can still be imported, by
    a caller's template or tensors. Does nothing if transformers is imported already.
    """
    if "transformers" in sys.modules:
        return
    find_spec, advice = importlib.util.find_spec, os.environ.get(ADVICE)

    def without_torch(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "torch" else find_spec(name, package)

    importlib.util.find_spec = without_torch
    os.environ[ADVICE] = "1"  # it would say that there are no models
    try:
        with no_collection():
            import transformers  # asks once whether there is torch

        assert not transformers.utils.is_torch_available()
    finally:
        importlib.util.find_spec = find_spec
        if advice is None:
            del os.environ[ADVICE]
        else:
            os.environ[ADVICE] = advice
