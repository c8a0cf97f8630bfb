"""Inputs of a call: trajectories and input features. Both are plain dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from twinkle_serve.data_format.messages import ChatMessage, Encoded
from twinkle_serve.data_format.weights import SampledSpan

InputDict: TypeAlias = dict[str, Any]
"""An input as a plain dict: the keys of `Trajectory` or `InputFeature`, and others of the caller's."""

Vector: TypeAlias = Any
"""A list, numpy array or torch tensor of one dimension."""

TruncationStrategy: TypeAlias = Literal["raise", "left", "right", "delete"]
"""Treatment of a prompt longer than `max_length`: raise an error, cut it on the left or right, or leave it out."""

TRUNCATION_STRATEGIES: tuple[TruncationStrategy, ...] = get_args(TruncationStrategy)


class Message(TypedDict, total=False):
    """One turn of a conversation, as chat templates read it."""

    role: str
    """system, user, assistant or tool, or another that the chat template reads."""
    content: str | Sequence[str | Mapping[str, object]] | Mapping[str, object] | None
    """Text, or a list of parts of type text. A tool's result may be a dict, which is written as JSON. None only beside
    tool_calls."""
    reasoning_content: str
    """The assistant's reasoning before its answer."""
    tool_calls: list[dict[str, object]]
    """`{"type": "function", "function": {"name": …, "arguments": …}}`; arguments as a dict or as JSON text."""
    tool_call_id: str
    """Id of the call that a tool's result answers."""
    name: str
    """Name of the tool, or of the speaker."""


class Trajectory(TypedDict, total=False):
    """A conversation, to be rendered by the template."""

    messages: list[ChatMessage]
    """`{"role": …, "content": …}`, in order. The only required key."""
    tools: list[dict[str, object]]
    """Tools that the model may call, as its chat template reads them."""
    images: list[object]
    """Must be empty: the service samples from text only."""
    videos: list[object]
    """Must be empty: the service samples from text only."""
    audios: list[object]
    """Must be empty: the service samples from text only."""
    user_data: Any
    """The caller's own data, passed through unchanged."""


class InputFeature(TypedDict, total=False):
    """A tokenised prompt. Arrays may be lists, numpy arrays or torch tensors of one dimension."""

    input_ids: Vector
    """Token ids of the prompt, shape [P]. The only required key."""
    attention_mask: Vector
    """1 for each token, shape [P]: padding is refused."""
    position_ids: Vector
    """Position of each token, 0 to P − 1, shape [P]; or rows of them, as Qwen's vision models have."""
    token_type_ids: Vector
    """0 for each token, shape [P] or rows of them."""
    mm_token_type_ids: Vector
    """0 for each token, since all are text. Shape [P] or rows of them."""
    labels: Vector
    """Token to predict at each position (rolled left by one), IGNORED_LABEL for none. Shape [P]. Labels of earlier
    turns are kept."""
    logprobs: Vector
    """Log p of each label, nats, at the position of the label; 0.0 where there is no label or its logprob is unknown.
    Shape [P]. Those of earlier turns are kept."""
    weight_versions: list[SampledSpan]
    """The tokens that were sampled, by the weights that sampled them, as written by `new_input_feature`."""
    length: int
    """P, if given."""
    messages: list[ChatMessage]
    """The conversation of the tokens, if they came from a Trajectory; appended messages continue it. A PromptError if
    the tokens are not those of the messages."""
    tools: list[dict[str, object]]
    """Tools that the model may call, as its chat template reads them."""
    user_data: Any
    """The caller's own data, passed through unchanged."""
    encoded: Encoded
    """The messages that the tokens cover, as written by `new_input_feature`. Without it, the tokens must be those of
    the rendered messages, or of the first of them."""


Input: TypeAlias = Trajectory | InputFeature
