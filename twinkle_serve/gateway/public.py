"""Texts of the service as clients may see them: without paths, addresses and tracebacks of the operator's machines."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

MAX_MESSAGE = 2000
"""Characters of a message; what is behind them is left out."""

_PATH = re.compile(r"(?<![\w/.:~-])~?/(?:[\w.@+~-]+/)+[\w.@+~-]*")
_TRACEBACK = re.compile(r"\s*(?:Traceback \(most recent call last\)|File \"[^\"]*\", line \d+).*", re.DOTALL)


def shown_message(message: str) -> str:
    """Returns a message without directories of paths, and without a traceback in it."""
    text = _TRACEBACK.sub(" …", message)
    text = _PATH.sub(lambda match: f"…/{PurePosixPath(match.group()).name}", " ".join(text.split()))
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"


def shown_model(model_id: str) -> str:
    """Returns a model's id; of a directory, its name."""
    if model_id.startswith(("/", "~", ".")):
        return PurePosixPath(model_id).name or "model"
    return model_id
