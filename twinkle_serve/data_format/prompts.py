"""What callers hand in: trajectories and input features. Both are plain dicts."""

from __future__ import annotations

from typing import Any, TypeAlias, TypedDict


class Trajectory(TypedDict, total=False):
    """A conversation, to be rendered by the template."""

    messages: list[dict[str, Any]]
    """`{"role": …, "content": …}`, in order. The only key that must be there."""
    tools: list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]
    user_data: Any
    """Carried over untouched."""


class InputFeature(TypedDict, total=False):
    """A tokenised prompt. Values may be lists, numpy arrays or torch tensors of one dimension."""

    input_ids: Any
    """Token ids of the prompt, shape [P]. The only key that must be there."""
    attention_mask: Any
    position_ids: Any
    labels: Any
    length: int


Input: TypeAlias = Trajectory | InputFeature
