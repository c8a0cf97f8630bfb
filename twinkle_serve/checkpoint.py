"""What a model's directory says of its weights, without loading them."""

from __future__ import annotations

from pathlib import Path


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each weight, from the headers of the safetensors files; empty where the model has none."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes
