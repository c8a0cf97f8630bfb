"""Checks of a model's files before and after an engine has loaded them."""

from __future__ import annotations

from pathlib import Path

from twinkle_serve.checkpoint import find_overflow, weight_shapes
from twinkle_serve.errors import EngineArgsError, EngineStartError, WeightsError
from twinkle_serve.tensors import MAX_FINITE


def require_readable(engine: str, model: Path) -> None:
    """Raises EngineStartError for a model whose weights cannot be read, or of which loaders would differ."""
    try:
        weight_shapes(model)
    except WeightsError as error:
        raise EngineStartError(f"{engine}: {error}") from None


def require_range(engine: str, model: Path, dtype: str) -> None:
    """Raises EngineArgsError if weights of a model are infinite in the engine's dtype, safetensors' name."""
    if (found := find_overflow(model, dtype)) is not None:
        weight, largest = found
        raise EngineArgsError(
            f"{engine}: the checkpoint's weight {weight!r} has values of magnitude {largest:g}; the engine holds it in "
            f"{dtype}, up to {MAX_FINITE[dtype]:g}: they would be infinite. Set engine_args.dtype to bfloat16 or "
            "float32."
        )
