"""Input features for training, and the calls of Twinkle's Template that multi-turn rollouts make."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from twinkle_serve import hub
from twinkle_serve.data_format.columns import IGNORED_LABEL, SAMPLED_COLUMNS, TYPE_COLUMNS, in_rows
from twinkle_serve.data_format.plain import as_items, is_absent
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.sequence import SampledSequence, columns_of
from twinkle_serve.data_format.user_data import user_data_get
from twinkle_serve.errors import PromptError
from twinkle_serve.template.ending import Ending
from twinkle_serve.template.features import (
    array_of,
    cut_spans,
    finite_logprobs,
    refuse_media,
    refuse_values_of_tokens,
    spans_of,
)
from twinkle_serve.validation import whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from twinkle_serve.data_format.messages import MessageParser
    from twinkle_serve.data_format.prompts import TruncationStrategy
    from twinkle_serve.template.template import Template

P = ParamSpec("P")
Ids: TypeAlias = NDArray[np.int64]
Feature: TypeAlias = dict[str, Any]
"""An InputFeature as a plain dict."""
ResultT_co = TypeVar("ResultT_co", covariant=True)

HERE = "the trajectory"
"""Name of the input in error messages."""


class _Encode(Protocol[P, ResultT_co]):
    @overload
    def __call__(self, messages: Mapping[str, Any], add_generation_prompt: bool = False) -> Feature: ...
    @overload
    def __call__(self, *, trajectory: Mapping[str, Any], add_generation_prompt: bool = False) -> Feature: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> ResultT_co: ...


def or_trajectory(encode: Callable[Concatenate[Any, P], ResultT_co]) -> _Encode[P, ResultT_co]:
    """Makes a method that encodes messages encode a trajectory too, as `TrainingTemplate.encode_trajectory`."""

    @functools.wraps(encode)
    def either(self: TrainingTemplate, *args: Any, **kwargs: Any) -> Any:
        if "trajectory" in kwargs:  # Twinkle's name
            return self.encode_trajectory(*args, **kwargs)
        messages, args = (args[0], args[1:]) if args else (kwargs.pop("messages", None), args)
        if isinstance(messages, Mapping) and len(args) < 2 and "where" not in kwargs:
            return self.encode_trajectory(messages, *args, **kwargs)
        return encode(self, messages, *args, **kwargs)

    return either  # type: ignore[return-value]  # a method, which is called without self


def model_directory(model: str | Path | None, model_id: str | Path | None) -> Path:
    """Returns the directory of a template's model, given under either name; one on a hub is downloaded.

    Raises:
        TypeError: neither or both are given.
        ModelNotFoundError: there is no such model.
    """
    if (model is None) == (model_id is None):
        raise TypeError("Template takes either model or model_id, a directory or the id of a model.")
    name = model_id if model is None else model
    if isinstance(name, Path) or (name != "demo" and Path(str(name)).is_dir()):
        return Path(str(name))
    return hub.resolve(str(name), weights=False)


def hub_model(model: str | Path | None, model_id: str | Path | None) -> tuple[str, str | None] | None:
    """Returns id and revision of a template's model on a hub; None if it is a directory."""
    name = model_id if model is None else model
    if isinstance(name, Path) or str(name) == "demo" or hub.is_path(str(name)) or Path(str(name)).is_dir():
        return None
    return str(name), None


class TrainingTemplate:
    """The part of a template that makes input features. Mixed into Template, which has what it uses."""

    if TYPE_CHECKING:
        continue_final_message: bool
        encode: Any
        max_length: int | None
        model: Path
        system: str | None
        tokenizer: PreTrainedTokenizerBase
        truncation_strategy: TruncationStrategy

        @property
        def special_tokens(self) -> tuple[str, ...]: ...

        def decode(self, ids: Sequence[int] | NDArray[np.int32], *, skip_special_tokens: bool = False) -> str: ...

        def opening(self, ids: NDArray[np.int32]) -> str: ...

        def tokenize(self, text: str, where: str) -> NDArray[np.int32]: ...

        def message_parser(self) -> MessageParser: ...

    def encode_trajectory(self, trajectory: Mapping[str, Any], add_generation_prompt: bool = False) -> Feature:
        """Encodes a conversation as an InputFeature, with the trajectory's other keys.

        Args:
            trajectory: the conversation; it is not changed.
            add_generation_prompt: whether to end at the beginning of the assistant's turn, to be sampled. Then no
                position has a label.

        Returns:
            `input_ids`, `attention_mask`, `position_ids` and `labels`, arrays of shape [P], and `length`. Labels are
            the tokens of the assistant's turns, of those alone that `key_rounds` in `user_data` lists if it does,
            rolled left by one; IGNORED_LABEL elsewhere.

        Raises:
            PromptError: an invalid conversation, one that is too long, or one whose turns cannot be told apart; images,
                or key_rounds that are no messages; or the assistant's last message would not be continued.
        """
        features = self.batch_encode([trajectory], add_generation_prompt)
        if not features:
            raise PromptError(f"{HERE} is longer than max_length={self.max_length}. Raise it, or call batch_encode.")
        return features[0]

    def batch_encode(
        self, trajectories: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> list[Feature]:
        """As `encode_trajectory`, for several; those that `truncation_strategy="delete"` leaves out are missing.

        Raises:
            PromptError: as `encode_trajectory`.
        """
        if isinstance(trajectories, (Mapping, str)) or not isinstance(trajectories, Iterable):
            raise PromptError(
                f"batch_encode takes a list of trajectories, got {type(trajectories).__name__}. Give rows, not columns."
            )
        encoded = []
        for trajectory in trajectories:
            if not isinstance(trajectory, Mapping):
                raise PromptError(f"{HERE} must be a dict with messages, got {trajectory!r:.80}.")
            refuse_media(trajectory, HERE)
            ids, labels = self._with_labels(trajectory, add_generation_prompt)
            # Columns about sampled tokens are of other ids: the messages are encoded anew.
            kept = {key: value for key, value in trajectory.items() if key not in SAMPLED_COLUMNS}
            encoded.append({**copy.deepcopy(kept), "input_ids": ids, "labels": labels})
        return self._invoke_post_pipeline(encoded)

    def _with_labels(self, trajectory: Mapping[str, Any], add_generation_prompt: bool) -> tuple[Ids, Ids]:
        given, tools = trajectory.get("messages"), trajectory.get("tools")
        messages = as_items(given)
        if not messages or add_generation_prompt:
            goes_on = Ending(default=self.continue_final_message).continues(given, HERE)
            ids = self.encode(given, tools, HERE, continue_final_message=goes_on).astype(np.int64)
            return ids, np.full_like(ids, IGNORED_LABEL)

        def encode(count: int, generation_prompt: bool) -> Ids:
            tokens: NDArray[np.int32] = self.encode(messages[:count], tools, HERE, generation_prompt)
            return tokens.astype(np.int64)

        ids = encode(len(messages), False)
        labels = np.full_like(ids, IGNORED_LABEL)
        rounds = _key_rounds(trajectory, len(messages))
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i in rounds:
                turn = self._turn(ids, i, encode)
                labels[turn] = ids[turn]
        return ids, labels

    def _turn(self, ids: Ids, i: int, encode: Callable[[int, bool], Ids]) -> slice:
        """Returns the tokens of message i, without those of the generation prompt before it.

        Args:
            ids: tokens of the whole conversation.
            encode: encodes the first messages, with a generation prompt or without.
        """
        until = encode(i + 1, False)
        start = _common_prefix(ids, encode(i, True)) if i else self._first_start(until, encode(1, True))
        changed = not i and not np.array_equal(ids[:start], until[:start])
        if changed or start <= (len(encode(i, False)) if i else 0):
            raise PromptError(
                f"{HERE}.messages[{i}] cannot be labelled: what the chat template writes before it changes with what "
                "follows. Encode it without labels, by add_generation_prompt=True."
                if i
                else f"{HERE}.messages[0] cannot be labelled: the chat template's beginning of the assistant's turn is "
                "not found once. Begin with a message of another role, or leave messages[0] out of key_rounds."
            )
        if np.array_equal(ids[: len(until)], until):
            return slice(start, len(until))
        # The chat template writes the last turn differently from earlier ones: with its reasoning, for example.
        special = np.isin(until, self.tokenizer.convert_tokens_to_ids(list(self.special_tokens)))
        ending = until[int(np.flatnonzero(special)[-1]) :] if special.any() else until[:0]
        ends = [at for at in range(start, len(ids)) if np.array_equal(ids[at : at + len(ending)], ending)]
        if not len(ending) or not ends:
            raise PromptError(f"{HERE}.messages[{i}] cannot be labelled: no special token ends its turn.")
        return slice(start, ends[0] + len(ending))

    def _first_start(self, ids: Ids, opened: Ids) -> int:
        """Returns the index after the beginning of the assistant's turn in a conversation of one message; 0 if unknown.

        Args:
            ids: tokens of the message.
            opened: the same with a generation prompt after it, which begins a turn in the same way.
        """
        prompt = opened[len(ids) :].astype(np.int32)
        if not len(prompt) or not np.array_equal(opened[: len(ids)], ids):
            return 0
        text = self.decode(prompt)
        beginning = self.tokenize(text.removesuffix(self.opening(prompt)), HERE).astype(np.int64)
        size = len(beginning)
        ends = [at + size for at in range(len(ids) - size + 1) if np.array_equal(ids[at : at + size], beginning)]
        return ends[0] if size and len(ends) == 1 else 0

    def _invoke_post_pipeline(self, input_features: Iterable[Feature]) -> list[Feature]:
        """Fits features to `max_length`, rolls their labels left by one, and adds the columns that follow from ids.

        The name is Twinkle's, whose rollouts call it after they appended tokens to a feature and put its labels back to
        the positions of their tokens. They know nothing of `logprobs`, which stay rolled; new tokens have none.
        """
        finished = []
        for feature in input_features:
            ids = np.asarray(feature["input_ids"], np.int64)
            given = feature.get("labels")
            labels = np.full_like(ids, IGNORED_LABEL) if given is None else np.asarray(given, np.int64)
            if labels.shape != ids.shape:
                raise PromptError(f"{HERE}.labels has shape {labels.shape}, input_ids {ids.shape}. Give one for each.")
            logprobs, spans = _longer_logprobs(feature, len(ids)), spans_of(feature, len(ids), HERE)
            kept = self._kept(len(ids))
            if kept is None:
                continue
            if kept != slice(0, len(ids)):
                refuse_values_of_tokens(feature, len(ids), HERE)
            present = [name for name in TYPE_COLUMNS if not is_absent(feature.get(name))]
            types = {name: _types_of(feature, name, len(ids))[..., kept] for name in present}
            ids, labels = ids[kept], labels[kept]
            columns: Feature = {
                "attention_mask": np.ones_like(ids),
                "position_ids": np.array(in_rows([*range(len(ids))], feature.get("position_ids")), np.int64),
                "length": len(ids),
            }
            rolled = np.append(labels[1:], IGNORED_LABEL)[: len(ids)]
            if logprobs is not None:
                columns["logprobs"] = np.where(rolled == IGNORED_LABEL, 0.0, logprobs[kept])
            if spans:
                columns["weight_versions"] = cut_spans(spans, kept)
            finished.append({**feature, **types, "input_ids": ids, "labels": rolled, **columns})
        return finished

    def _kept(self, length: int) -> slice | None:
        """Returns the part of a sequence that fits; None to leave it out."""
        if self.max_length is None or length <= self.max_length:
            return slice(0, length)
        if self.truncation_strategy == "raise":
            raise PromptError(
                f"{HERE} has {length} tokens, max_length is {self.max_length}. Shorten it, raise max_length, or set "
                "truncation_strategy to left, right or delete."
            )
        cut = {"left": slice(length - self.max_length, length), "right": slice(0, self.max_length)}
        return cut.get(self.truncation_strategy)

    def concat_input_feature(self, prompt_input_feature: Mapping[str, Any], new_tokens: Sequence[int]) -> Feature:
        """Appends sampled tokens to a feature, as the sampler does: see `SampledSequence.new_input_feature`.

        Raises:
            PromptError: as `sample`.
        """
        from twinkle_serve.template.prompts import encode_inputs

        prompt = encode_inputs([prompt_input_feature], cast("Template", self))[0]
        tokens = [whole_number("new_tokens", token, 0, error=PromptError) for token in new_tokens]
        sample = SampledSequence("stop", tokens, decoded=self.decode(tokens))
        response = SampleResponse(
            columns=columns_of([sample]),
            prompts=[prompt.ids],
            inputs=[dict(prompt_input_feature)],
            parser=self.message_parser(),
            turns=(prompt.turn,),
            prompt_indices=(0,),
        )
        feature: Feature = response.sequences[0].new_input_feature
        return feature

    def parse_tool_call(self, decoded: str) -> list[dict[str, Any]]:
        """Returns the tool calls in a sample's text, in OpenAI's form, arguments parsed; [] if it has none."""
        calls = self.message_parser().message(decoded or "").get("tool_calls", [])
        return [{key: value for key, value in call.items() if key != "id"} for call in calls]

    def clean_tool_call(self, decoded: str) -> str:
        """Returns a sample's text without its tool calls."""
        return str(self.message_parser().message(decoded or "")["content"]).rstrip()

    def batch_decode(self, token_ids: Iterable[Sequence[int]], **options: Any) -> list[str]:
        """As `decode`, for several sequences."""
        return [self.decode(ids, **options) for ids in token_ids]

    @property
    def model_id(self) -> str:
        """Directory of the model."""
        return str(self.model)

    @property
    def processor(self) -> Any:
        """The tokenizer: inputs here are text."""
        return self.tokenizer

    @property
    def default_system(self) -> str | None:
        """System prompt for conversations without one."""
        return self.system

    @property
    def is_mm(self) -> bool:
        """Whether the template reads images, videos or audio: none does."""
        return False


def _key_rounds(trajectory: Mapping[str, Any], count: int) -> Sequence[int]:
    """Returns the indices of the messages to learn: those of `key_rounds`, by default all."""
    given = user_data_get(trajectory.get("user_data"), "key_rounds")
    if is_absent(given):
        return range(count)
    rounds = as_items(given)
    if rounds is None:
        raise PromptError(f"{HERE}: key_rounds must be a list of indices of messages, got {given!r:.80}.")
    return [whole_number(f"{HERE}: an index in key_rounds", i, 0, count - 1, error=PromptError) for i in rounds]


def _longer_logprobs(feature: Feature, length: int) -> NDArray[np.float64] | None:
    """Returns the logprobs of a feature to which tokens may have been appended, with 0.0 for these. None if absent."""
    if is_absent(feature.get("logprobs")):
        return None
    given = array_of(feature["logprobs"], f"{HERE}.logprobs")
    if given.ndim == 1 and len(given) < length:
        given = np.append(given, np.zeros(length - len(given)))
    return finite_logprobs(given, length, HERE)


def _types_of(feature: Feature, name: str, length: int) -> NDArray[Any]:
    """Returns a column with the types of tokens, shape [P] or rows of them."""
    column = array_of(feature[name], f"{HERE}.{name}")
    if column.ndim == 0 or column.shape[-1] != length:
        raise PromptError(
            f"{HERE}.{name} has shape {column.shape}, input_ids ({length},). Append its tokens' types too."
        )
    return column


def _common_prefix(mine: Ids, theirs: Ids) -> int:
    """Returns the number of tokens with which both begin."""
    length = min(len(mine), len(theirs))
    different = np.flatnonzero(mine[:length] != theirs[:length])
    return int(different[0]) if len(different) else length
