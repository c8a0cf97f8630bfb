"""Results of a call: numpy columns underneath, Python lists on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.conventions import follows_twinkle
from twinkle_serve.data_format.columns import IGNORED_LABEL
from twinkle_serve.data_format.features import continued_feature
from twinkle_serve.data_format.messages import MessageParser, Turn
from twinkle_serve.data_format.prompts import InputDict, InputFeature
from twinkle_serve.data_format.samples import (
    NO_SEED,
    STOP_REASONS,
    FloatArray,
    PromptScores,
    SampleColumns,
    SamplingMask,
    StopReason,
)
from twinkle_serve.data_format.sequence import SampledSequence, columns_of, same
from twinkle_serve.data_format.training_batch import TensorLibrary, TrainingBatch, build_batch
from twinkle_serve.data_format.weights import VersionSpan

__all__ = ["IGNORED_LABEL", "SampleResponse", "SampledSequence"]


def _computed_columns(response: SampleResponse) -> SampleColumns:
    return columns_of(response.sequences)


@dataclass(init=False, eq=False, repr=False)
class SampleResponse(Sequence["SampleResponse"]):
    """Samples of one or more prompts.

    `sequences` is flat and prompt-major: p0s0, p0s1, …, p1s0, …. The response is also a sequence over its prompts:
    `len(response)` is the number of prompts, and `response[i]` is the response to prompt i alone.
    """

    prompts: list[NDArray[np.int32]]
    """Token ids of each prompt, shape [P_i]."""
    inputs: list[InputDict]
    """The input of each prompt, as it was when the call was sent; empty after a call with return_inputs=False."""
    logprobs_mode: str
    """Distribution of the logprobs. `raw_logprobs`: the model's own, before temperature, penalties, top-k and top-p.
    `processed_logprobs`: the one that was sampled from. "" in a response made by hand."""
    logprobs_are_masked: bool
    """Whether the logprobs are those under the mask of structured_outputs. False where there is none, and for raw
    logprobs of engines that compute them before it."""
    parser: MessageParser
    """Parses a sample's text into the assistant's message."""
    turns: tuple[Turn, ...]
    """The beginning of the sampled turn in each prompt; empty if no prompt has any."""
    prompt_indices: tuple[int, ...]
    """Index in the call of each prompt here; differs from 0, 1, … in parts of a response."""
    columns: SampleColumns = cast(Any, cached_property(_computed_columns))  # noqa: RUF009  computed if made by hand
    """The samples as numpy columns. Column `group` is the index into `prompts`; rows are sorted by (group, sample)."""

    def __init__(
        self,
        sequences: Sequence[SampledSequence] | None = None,
        prompt_token_ids: list[int] | None = None,
        prompt_logprobs: list[float | None] | None = None,
        topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None,
        *,
        columns: SampleColumns | None = None,
        prompts: list[NDArray[np.int32]] | None = None,
        inputs: list[InputDict] | None = None,
        logprobs_mode: str = "",
        logprobs_are_masked: bool = False,
        parser: MessageParser | None = None,
        turns: tuple[Turn, ...] = (),
        prompt_indices: tuple[int, ...] = (),
    ) -> None:
        """Makes the response to one prompt by hand, for a sampler of your own; or from columns, as the router does.

        Args:
            sequences: samples of one prompt, kept as they are.
            prompt_token_ids: token ids of that prompt.
            prompt_logprobs: log p of each of its tokens, nats, None at position 0.
            topk_prompt_logprobs: the likeliest (token id, log p) at each of its positions, None at position 0.
            columns: the samples as columns, instead of these four. The other arguments come with it.
        """
        by_hand = (sequences, prompt_token_ids, prompt_logprobs, topk_prompt_logprobs)
        if (sequences is None) == (columns is None) or (columns is not None and any(x is not None for x in by_hand)):
            raise TypeError("SampleResponse takes either sequences or columns, and each with its own arguments.")
        self.prompts = prompts or []
        self.inputs = inputs or []
        self.logprobs_mode = logprobs_mode
        self.logprobs_are_masked = logprobs_are_masked
        self.parser = MessageParser() if parser is None else parser
        self.turns = turns
        self.prompt_indices = prompt_indices
        self._by_hand = columns is None
        if columns is not None:
            self.columns = columns
            return
        ids = [] if prompt_token_ids is None else prompt_token_ids
        self.prompts, self.prompt_indices = [np.asarray(ids, np.int32)], (0,)
        vars(self).update(  # these stand for the cached properties
            sequences=sequences,
            prompt_token_ids=prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
        )

    def __getstate__(self) -> dict[str, object]:
        """Packs prompts into one array, since each array costs Ray a few microseconds; leaves out cached properties."""
        if self._by_hand:
            return dict(vars(self))
        state = {field.name: getattr(self, field.name) for field in fields(self)} | {"_by_hand": False}
        lengths = [len(prompt) for prompt in self.prompts]
        return state | {"prompts": (np.concatenate([*self.prompts, np.empty(0, np.int32)]), lengths)}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        if not self._by_hand:
            ids, lengths = cast("tuple[NDArray[np.int32], list[int]]", state["prompts"])
            ends = np.cumsum(lengths).tolist()
            self.prompts = [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def __eq__(self, other: object) -> bool:
        """Compares samples, and each prompt's tokens and logprobs."""
        if not isinstance(other, SampleResponse):
            return NotImplemented
        if len(self) != 1 or len(other) != 1:
            return len(self) == len(other) and all(map(SampleResponse.__eq__, self, other))
        names = ("prompt_token_ids", "prompt_logprobs", "topk_prompt_logprobs")
        return list(self.sequences) == list(other.sequences) and all(
            same(getattr(self, name), getattr(other, name)) for name in names
        )

    def __hash__(self) -> int:
        return hash(tuple(self.sequences))

    @cached_property
    def sequences(self) -> Sequence[SampledSequence]:
        """All samples, prompt-major."""
        starts = self.columns.starts
        return [_Row(self, row, int(starts[row])) for row in range(len(self.columns))]

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> SampleResponse: ...
    @overload
    def __getitem__(self, index: slice) -> list[SampleResponse]: ...
    def __getitem__(self, index: int | slice) -> SampleResponse | list[SampleResponse]:
        if isinstance(index, slice):
            return [self._prompt(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        return self._prompt(index % len(self))

    def __iter__(self) -> Iterator[SampleResponse]:
        return (self._prompt(i) for i in range(len(self)))

    def _prompt(self, index: int) -> SampleResponse:
        if len(self) == 1:
            return self
        first, last = np.searchsorted(self.columns.group, [index, index + 1])
        part = self.columns.take(np.arange(first, last)).regrouped({index: 0})
        return SampleResponse(
            columns=part,
            prompts=[self.prompts[index]],
            inputs=self.inputs[index : index + 1],
            logprobs_mode=self.logprobs_mode,
            logprobs_are_masked=self.logprobs_are_masked,
            parser=self.parser,
            turns=self.turns[index : index + 1],
            prompt_indices=(self.prompt_indices[index],),
        )

    @property
    def prompt_index(self) -> int:
        """Index in the call of this response's only prompt.

        Raises:
            ValueError: the response has several prompts.
        """
        return self.prompt_indices[self._only("prompt_index")]

    @cached_property
    def prompt_token_ids(self) -> list[int]:
        """Token ids of this response's only prompt. P of them.

        Raises:
            ValueError: the response has several prompts.
        """
        return cast(list[int], self.prompts[self._only("prompt_token_ids")].tolist())

    @cached_property
    def prompt_logprobs(self) -> list[float | None] | None:
        """Log p of each prompt token, nats, None at position 0 and before prompt_logprobs_start; None if not requested.
        P of them.

        Raises:
            ValueError: the response has several prompts.
        """
        scores = self._scores("prompt_logprobs")
        if scores is None:
            return None
        without = max(1, scores.start)
        return [*[None] * without, *scores.logprobs[without - scores.start :].tolist()]

    @cached_property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """The k likeliest (token id, log p) at each prompt position, None at position 0 and before
        prompt_logprobs_start. P lists of k, nats.

        None if not requested.

        Raises:
            ValueError: the response has several prompts.
        """
        scores = self._scores("topk_prompt_logprobs")
        if scores is None or not scores.top_tokens.shape[1]:
            return None
        without = max(1, scores.start)
        kept = slice(without - scores.start, None)
        rows = zip(scores.top_tokens[kept].tolist(), scores.top_logprobs[kept].tolist(), strict=True)
        return [*[None] * without, *(list(zip(tokens, logprobs, strict=True)) for tokens, logprobs in rows)]

    def to_training_batch(
        self,
        *,
        packed: bool = False,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        pad_token_id: int = 0,
        tensors: TensorLibrary = "torch",
    ) -> TrainingBatch:
        """Returns prompts and samples as tensors for a trainer, one row a sample in the order of `sequences`.

        Ids, labels and logprobs are those of each sample's `new_input_feature`: labels and logprobs are rolled left by
        one, and those of earlier turns are included, also after a call with return_inputs=False. For some of the
        samples only, put them into a response: each keeps its prompt in `SampleResponse(chosen).to_training_batch()`.

        Args:
            packed: whether the samples follow each other in one row without padding, for kernels that take sequences of
                several lengths; False: one padded row each.
            pad_to_multiple_of: rows are padded to a multiple of so many tokens. None: to the longest one.
            max_length: the most tokens that prompt and sample may have together. None: unlimited.
            pad_token_id: token id of the padding.
            tensors: torch (CPU tensors) or numpy (arrays).

        Raises:
            RequestError: a sample is longer than `max_length`: none is cut; torch is not installed; an argument, or a
                sample made by hand, is invalid.
            ValueError: a sample made by hand has invalid logprobs, see `SampledSequence.logprob_array`.
        """
        return build_batch(
            self._parts(),
            packed=packed,
            pad_to_multiple_of=pad_to_multiple_of,
            max_length=max_length,
            pad_token_id=pad_token_id,
            tensors=tensors,
        )

    def _parts(self) -> Sequence[SampleResponse]:
        """Responses that have the samples in `sequences`, in order."""
        return [self]

    def _scores(self, name: str) -> PromptScores | None:
        return self.columns.scores.get(self._only(name))

    def _only(self, name: str) -> int:
        if len(self) != 1:
            raise ValueError(
                f"{name} needs a response to one prompt, this one has {len(self)}. Iterate over it: response[i].{name}"
            )
        return 0

    def __repr__(self) -> str:
        tokens = sum(len(sequence.token_array) for sequence in self.sequences)
        return f"SampleResponse({len(self)} prompts, {len(self.sequences)} sequences, {tokens} tokens)"


class _Row(SampledSequence):
    """One sample of a call: a row of its response's columns."""

    def __init__(self, response: SampleResponse, row: int, start: int) -> None:
        self.response, self.row, self.start = response, row, start

    def __getstate__(self) -> dict[str, object]:
        """Leaves out cached properties."""
        return {"response": self.response, "row": self.row, "start": self.start}

    routed_experts = None

    @property
    def _tokens_at(self) -> slice:
        return slice(self.start, self.start + int(self.response.columns.lengths[self.row]))

    @property
    def token_array(self) -> NDArray[np.int32]:
        return self.response.columns.tokens[self._tokens_at]

    @property
    def _logprob_count(self) -> int:
        """Number of logprobs at each position."""
        counts = self.response.columns.logprob_counts
        return self.response.columns.logprobs_width if counts is None else int(counts[self.row])

    @property
    def logprob_array(self) -> FloatArray | None:
        logprobs = self.response.columns.logprobs
        return None if logprobs is None or not self._logprob_count else logprobs[self._tokens_at, 0]

    @cached_property
    def tokens(self) -> list[int]:
        return cast(list[int], self.token_array.tolist())

    @cached_property
    def logprobs(self) -> list[list[tuple[int, float]]] | None:
        columns, count = self.response.columns, self._logprob_count
        if columns.logprobs is None or not count:
            return None
        values = columns.logprobs[self._tokens_at, :count].tolist()
        if columns.logprob_tokens is None or count == 1 or (count == 2 and follows_twinkle()):
            return [[(token, row[0])] for token, row in zip(self.tokens, values, strict=True)]
        ids = columns.logprob_tokens[self._tokens_at, :count].tolist()
        if follows_twinkle():
            return [list(zip(tokens[1:], row[1:], strict=True)) for tokens, row in zip(ids, values, strict=True)]
        # The sampled token is often among the k likeliest: dict keeps its first place.
        return [list(dict(zip(tokens, row, strict=True)).items()) for tokens, row in zip(ids, values, strict=True)]

    @property
    def decoded(self) -> str:
        return self.response.columns.decoded[self.row]

    @property
    def whole_text(self) -> str:
        texts = self.response.columns.whole_text
        return self.decoded if texts is None else texts[self.row]

    @property
    def sampling_mask(self) -> SamplingMask | None:
        masks = self.response.columns.masks
        return None if masks is None else masks[self.row]

    @property
    def stop_reason(self) -> StopReason:
        return STOP_REASONS[int(self.response.columns.stop_reason[self.row])]

    @property
    def seed(self) -> int | None:
        seed = int(self.response.columns.seed[self.row])
        return None if seed == NO_SEED else seed

    @property
    def engine(self) -> str:
        return self.response.columns.engine[self.row]

    @property
    def adapter(self) -> str:
        return self.response.columns.adapter[self.row]

    @property
    def weight_versions(self) -> list[VersionSpan]:
        spans = self.response.columns.weight_versions[self.row]
        if not spans:  # of a sample made by hand
            return []
        ends = [start for _, start in spans[1:]] + [int(self.response.columns.lengths[self.row])]
        return [VersionSpan(label, start, end) for (label, start), end in zip(spans, ends, strict=True)]

    @property
    def prompt_index(self) -> int:
        return self.response.prompt_indices[int(self.response.columns.group[self.row])]

    @property
    def _feature(self) -> object:
        return super()._feature if self.response.inputs else None

    @cached_property
    def new_input_feature(self) -> InputFeature:
        return continued_feature(self)
