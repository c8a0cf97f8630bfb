"""Validates the inputs of a call and converts them to prompts of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.columns import IGNORED_LABEL
from twinkle_serve.data_format.inputs import as_list
from twinkle_serve.data_format.messages import Turn
from twinkle_serve.data_format.plain import is_absent
from twinkle_serve.errors import PromptError, unknown_name
from twinkle_serve.template.ending import Ending
from twinkle_serve.template.features import cut_spans, ids_of, labels_of, logprobs_of, refuse_media, spans_of
from twinkle_serve.template.matching import match_messages
from twinkle_serve.template.template import Template

TEXT_KEYS = {"text", "add_special_tokens", "user_data"}
TRAJECTORY_KEYS = {"messages", "tools", "images", "videos", "audios", "user_data"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of one input of a call."""

    ids: NDArray[np.int32]
    """Token ids, shape [P]."""
    index: int = 0
    """Index of its input in the call; `truncation_strategy="delete"` leaves inputs out."""
    turn: Turn = field(default_factory=Turn)
    """The beginning of the sampled turn that it contains, and the training columns of earlier turns."""


class InputEncoder:
    """Encodes the inputs of one call, all at once or some at a time."""

    def __init__(
        self,
        inputs: object,
        template: Template,
        generation_prompt: bool = True,
        continue_final_message: bool | None = None,
    ) -> None:
        """Reads the inputs. Arguments and errors as of `encode_inputs`."""
        items = as_list(inputs)
        if items is None:
            raise PromptError(
                f"inputs must be a Trajectory or an InputFeature, or a list of one of them, got "
                f'{type(inputs).__name__}. Give text as {{"messages": [{{"role": "user", "content": text}}]}}.'
            )
        if not items:
            raise PromptError("inputs is empty. Give at least one Trajectory or InputFeature.")
        kinds = [_kind(item, i) for i, item in enumerate(items)]
        if len(set(kinds)) > 1:
            other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
            raise PromptError(
                f"inputs mixes kinds: inputs[0] is {_article(kinds[0])}, inputs[{other}] is {_article(kinds[other])}. "
                "Send each kind in a separate call."
            )
        self._items, self._template = items, template
        self._encode = ENCODERS[kinds[0]]
        self._ending = Ending(generation_prompt, continue_final_message, template.continue_final_message)

    def __len__(self) -> int:
        return len(self._items)

    def encode(self, first: int, last: int) -> list[Prompt]:
        """Encodes the inputs from `first` to before `last`; see `encode_inputs`."""
        template, ending = self._template, self._ending
        encoded = (self._encode(item, i, template, ending) for i, item in enumerate(self._items[first:last], first))
        return [prompt for each in encoded if (prompt := _fit(each, template)) is not None]

    def require_some(self, prompts: Sequence[Prompt]) -> None:
        """Raises PromptError if all inputs were left out."""
        if not prompts:
            raise PromptError(
                f"each of the {len(self)} inputs is longer than max_length={self._template.max_length}, and "
                'truncation_strategy="delete" leaves them out. Raise max_length.'
            )


def encode_inputs(
    inputs: object, template: Template, generation_prompt: bool = True, continue_final_message: bool | None = None
) -> list[Prompt]:
    """Converts inputs to prompts, in order; long ones are left out under `truncation_strategy="delete"`.

    A single dict is one input. The prompt of an InputFeature is its `input_ids`. If it has messages that they do not
    hold yet, their rendered tokens follow.

    Args:
        inputs: Trajectories or InputFeatures, one or a list, or PackedInputs.
        template: template of the call.
        generation_prompt: whether messages are rendered up to the beginning of the assistant's turn, or only up to the
            last message.
        continue_final_message: whether the assistant's message that ends a conversation is continued; None: as the
            template says.

    Raises:
        RequestError: `continue_final_message` has another type.
        PromptError: no input, inputs of several kinds, one that is neither a Trajectory nor an InputFeature, one that
            is too long, or all are left out.
    """
    encoder = InputEncoder(inputs, template, generation_prompt, continue_final_message)
    prompts = encoder.encode(0, len(encoder))
    encoder.require_some(prompts)
    return prompts


def _kind(item: object, i: int) -> str:
    if not isinstance(item, Mapping):
        raise PromptError(
            f"inputs[{i}] is {type(item).__name__}, not a Trajectory (a dict with messages) or an InputFeature "
            "(a dict with input_ids)."
        )
    known = ("text", "messages", "input_ids")
    kinds = [kind for kind in known if not is_absent(item.get(kind))]
    # new_input_feature returns both: its tokens are continued. An empty one is refused where it is read.
    kinds = kinds or [kind for kind in known if item.get(kind) is not None]
    if not kinds:
        close = unknown_name("input", next(iter(item), ""), known).split(" Known:")[0]
        raise PromptError(
            f"inputs[{i}] has neither messages nor input_ids: {close} Its keys: {sorted(map(str, item))}."
        )
    return kinds[-1]


def _article(kind: str) -> str:
    articles = {"messages": "a Trajectory (messages)", "input_ids": "an InputFeature (input_ids)"}
    return articles.get(kind, "a text")


def _from_text(item: Mapping[str, object], index: int, template: Template, ending: Ending) -> Prompt:
    where, text = f"inputs[{index}]", item["text"]
    for key, value in item.items():
        if key not in TEXT_KEYS and not is_absent(value):
            raise PromptError(f"{where}: {unknown_name('key of a text', key, TEXT_KEYS)}.")
    if not isinstance(text, str):
        raise PromptError(f"{where}.text must be text, got {type(text).__name__}.")
    special = item.get("add_special_tokens", True)
    if not isinstance(special, bool):
        raise PromptError(f"{where}.add_special_tokens must be true or false, got {special!r}.")
    ids = template.tokenize(text, where, special_tokens=special)
    if not len(ids):
        raise PromptError(f"{where}.text has no tokens. Give at least one character.")
    return Prompt(ids, index)


def _from_messages(item: Mapping[str, object], index: int, template: Template, ending: Ending) -> Prompt:
    where = f"inputs[{index}]"
    refuse_media(item, where)
    for key, value in item.items():
        if key not in TRAJECTORY_KEYS and not is_absent(value):
            raise PromptError(f"{where}: {unknown_name('key of a Trajectory', key, TRAJECTORY_KEYS)}.")
    messages, tools = item["messages"], item.get("tools")
    if ending.continues(messages, where):
        ids = template.encode(messages, tools, where, continue_final_message=True)
        written = template.renderer.final_text(messages, where)
        return Prompt(ids, index, Turn(opening=written, resumed_at=len(ids), written=written))
    ids = template.encode(messages, tools, where, ending.generation_prompt)
    return Prompt(ids, index, _opened_turn(template.opening(ids)))


def _from_ids(item: Mapping[str, object], index: int, template: Template, ending: Ending) -> Prompt:
    where = f"inputs[{index}]"
    refuse_media(item, where)
    ids = ids_of(item, where)
    labels = labels_of(item, ids, where)
    logprobs, spans = logprobs_of(item, labels, len(ids), where), spans_of(item, len(ids), where)
    rest = match_messages(item, ids, where, template, ending)
    whole = np.concatenate([ids, rest.following]) if len(rest.following) else ids
    if labels is not None:
        labels = np.concatenate([labels, np.full(len(rest.following), IGNORED_LABEL, np.int64)])
    if logprobs is not None:
        logprobs = np.concatenate([logprobs, np.zeros(len(rest.following))])
    opening = _opening(template, whole, rest.resumed_at, rest.written)
    if rest.resumed_at is None and labels is None and logprobs is None and not spans:
        return Prompt(whole, index, _opened_turn(opening))
    turn = Turn(
        opening=opening,
        resumed_at=rest.resumed_at,
        written=rest.written,
        labels=labels,
        logprobs=logprobs,
        weight_versions=spans,
    )
    return Prompt(whole, index, turn)


ENCODERS = {"text": _from_text, "messages": _from_messages, "input_ids": _from_ids}
"""By the key that tells the kind of an input."""


@lru_cache(maxsize=64)
def _opened_turn(opening: str) -> Turn:
    """A turn with this opening only; cached, so that a response pickles it once for all its prompts."""
    return Turn(opening=opening)


def _opening(template: Template, ids: NDArray[np.int32], start: int | None, written: str | None) -> str:
    """Text of a prompt that belongs to the sampled message, whose tokens begin at `start` if it is unfinished.

    Before its first token, an unfinished message has what the caller wrote, or what the prompt opened.
    """
    if start is None:
        return template.opening(ids)
    before = template.opening(ids[:start]) if written is None else written
    return before + template.decode(ids[start:])


def _fit(prompt: Prompt, template: Template) -> Prompt | None:
    """Applies the truncation strategy to a prompt of more than `max_length` tokens; None if it is left out.

    Raises:
        PromptError: it is longer and the strategy is raise.
    """
    max_length, length = template.max_length, len(prompt.ids)
    if max_length is None or length <= max_length:
        return prompt
    if template.truncation_strategy == "delete":
        return None
    if template.truncation_strategy == "raise":
        raise PromptError(
            f"inputs[{prompt.index}] has {length} tokens, max_length is {max_length}. Shorten it, raise max_length, or "
            "set truncation_strategy to left, right or delete."
        )
    left = template.truncation_strategy == "left"
    kept = slice(length - max_length, length) if left else slice(0, max_length)
    turn, start = prompt.turn, prompt.turn.resumed_at
    if turn.written is not None and not left:
        raise PromptError(
            f"inputs[{prompt.index}] has {length} tokens, max_length is {max_length}, and a message that is continued "
            "cannot be cut on the right. Set truncation_strategy to left or delete."
        )
    ids, start = prompt.ids[kept], None if start is None else min(max(start - kept.start, 0), max_length)
    return replace(
        prompt,
        ids=ids,
        turn=replace(
            turn,
            # Text cut on the left still belongs to the message; cut on the right, the sample continues what is left.
            opening=turn.opening if left else _opening(template, ids, start, None),
            labels=None if turn.labels is None else turn.labels[kept],
            logprobs=None if turn.logprobs is None else turn.logprobs[kept],
            weight_versions=tuple(cut_spans(turn.weight_versions, kept)),
            resumed_at=start,
        ),
    )
