"""What callers hand in: trajectories and input features. Both are plain dicts."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, TypedDict

from twinkle_serve.data_format.messages import Encoded


class Message(TypedDict, total=False):
    """One turn of a conversation, as chat templates read it."""

    role: str
    """system, user, assistant or tool. The only key that must be there."""
    content: Any
    """Text, or parts of type text."""
    reasoning_content: str
    """What the assistant thought before it answered."""
    tool_calls: list[dict[str, Any]]
    """`{"type": "function", "function": {"name": …, "arguments": …}}`; arguments as a dict or its JSON."""


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
    """Token to predict at each position, IGNORED_LABEL where none. Those of earlier turns are kept."""
    length: int
    messages: list[dict[str, Any]]
    """What the tokens say, where they came from a Trajectory; more of them continue it."""
    tools: list[dict[str, Any]]
    user_data: Any
    """Carried over untouched."""
    encoded: Encoded
    """What of `messages` the tokens hold, as `new_input_feature` wrote it."""


Input: TypeAlias = Trajectory | InputFeature

TruncationStrategy: TypeAlias = Literal["raise", "left", "right", "delete"]
"""Treatment of a prompt that is too long: an error, its last or first tokens, or leaving it out of the call."""
