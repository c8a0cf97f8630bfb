"""Results of a call: numpy columns underneath, Python lists on demand."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import cast, overload

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.columns import OWN_COLUMNS, grown_columns
from twinkle_serve.data_format.messages import (
    ChatMessage,
    Encoded,
    MessageParser,
    Turn,
    checksum,
    ids_checksum,
    tools_checksum,
)
from twinkle_serve.data_format.plain import as_items, is_absent, plain
from twinkle_serve.data_format.prompts import InputDict, InputFeature
from twinkle_serve.data_format.samples import (
    NO_SEED,
    STOP_REASONS,
    FloatArray,
    PromptScores,
    SampleColumns,
    StopReason,
)
from twinkle_serve.data_format.tool_calls import Tools
from twinkle_serve.data_format.weights import VersionSpan

IGNORED_LABEL = -100
"""Label of a position without a loss, as in torch's cross entropy."""


@dataclass(frozen=True, eq=False)
class SampleResponse(Sequence["SampleResponse"]):
    """Samples of one or more prompts.

    `sequences` is flat and prompt-major: p0s0, p0s1, …, p1s0, …. The response is also a sequence over its prompts:
    `len(response)` is the number of prompts, and `response[i]` is the response to prompt i alone.
    """

    columns: SampleColumns
    """The samples as numpy columns. Column `group` is the index into `prompts`; rows are sorted by (group, sample)."""
    prompts: list[NDArray[np.int32]]
    """Token ids of each prompt, shape [P_i]."""
    inputs: list[InputDict]
    """The input of each prompt, as it was when the call was sent; empty after a call with return_inputs=False."""
    logprobs_mode: str
    """Distribution of the logprobs. `raw_logprobs`: the model's own, before temperature, penalties, top-k and top-p.
    `processed_logprobs`: the one that was sampled from."""
    parser: MessageParser = field(default_factory=MessageParser)
    """Parses a sample's text into the assistant's message."""
    turns: tuple[Turn, ...] = ()
    """The beginning of the sampled turn in each prompt; empty if no prompt has any."""
    prompt_indices: tuple[int, ...] = field(default=())
    """Index in the call of each prompt here; differs from 0, 1, … in parts of a response."""

    def __getstate__(self) -> dict[str, object]:
        """Packs prompts into one array, since each array costs Ray a few microseconds; leaves out cached properties."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        lengths = [len(prompt) for prompt in self.prompts]
        return state | {"prompts": (np.concatenate([*self.prompts, np.empty(0, np.int32)]), lengths)}

    def __setstate__(self, state: dict[str, object]) -> None:
        ids, lengths = cast("tuple[NDArray[np.int32], list[int]]", state["prompts"])
        ends = np.cumsum(lengths).tolist()
        prompts = [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        self.__dict__.update(state, prompts=prompts)

    @cached_property
    def sequences(self) -> list[SampledSequence]:
        """All samples, prompt-major."""
        starts = self.columns.starts
        return [SampledSequence(self, row, int(starts[row])) for row in range(len(self.columns))]

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

    @property
    def prompt_token_ids(self) -> list[int]:
        """Token ids of this response's only prompt. P of them.

        Raises:
            ValueError: the response has several prompts.
        """
        return cast(list[int], self.prompts[self._only("prompt_token_ids")].tolist())

    @property
    def prompt_logprobs(self) -> list[float | None] | None:
        """Log p of each prompt token, nats, None at position 0; None if not requested. P of them.

        Raises:
            ValueError: the response has several prompts.
        """
        scores = self._scores("prompt_logprobs")
        return None if scores is None else [None, *scores.logprobs[1:].tolist()]

    @property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """The k likeliest (token id, log p) at each prompt position, None at position 0. P lists of k, nats.

        None if not requested.

        Raises:
            ValueError: the response has several prompts.
        """
        scores = self._scores("topk_prompt_logprobs")
        if scores is None or not scores.top_tokens.shape[1]:
            return None
        rows = zip(scores.top_tokens[1:].tolist(), scores.top_logprobs[1:].tolist(), strict=True)
        return [None, *(list(zip(tokens, logprobs, strict=True)) for tokens, logprobs in rows)]

    def _scores(self, name: str) -> PromptScores | None:
        return self.columns.scores.get(self._only(name))

    def _only(self, name: str) -> int:
        if len(self) != 1:
            raise ValueError(
                f"{name} needs a response to one prompt, this one has {len(self)}. Iterate over it: response[i].{name}"
            )
        return 0

    def __repr__(self) -> str:
        return f"SampleResponse({len(self)} prompts, {len(self.columns)} sequences, {len(self.columns.tokens)} tokens)"


@dataclass(frozen=True, eq=False, repr=False)
class SampledSequence:
    """One sample: a view of one row of a SampleResponse."""

    response: SampleResponse
    """The response that the sample is part of."""
    row: int
    """Index of the sample in the response's columns."""
    start: int
    """Index of its first token in the column `tokens`."""

    @property
    def _tokens_at(self) -> slice:
        return slice(self.start, self.start + int(self.response.columns.lengths[self.row]))

    @property
    def token_array(self) -> NDArray[np.int32]:
        """Sampled token ids, prompt excluded. Shape [T], int32."""
        return self.response.columns.tokens[self._tokens_at]

    @property
    def logprob_array(self) -> FloatArray | None:
        """Log p of each sampled token, nats, under `SampleResponse.logprobs_mode`. Shape [T]; None if not requested."""
        logprobs = self.response.columns.logprobs
        return None if logprobs is None else logprobs[self._tokens_at, 0]

    @cached_property
    def tokens(self) -> list[int]:
        """Sampled token ids, prompt excluded. T of them."""
        return cast(list[int], self.token_array.tolist())

    @cached_property
    def logprobs(self) -> list[list[tuple[int, float]]] | None:
        """(token id, log p) at each position, nats: the sampled token, then the others of the k likeliest, best first.

        T lists of up to 1 + k. `[lp[0][1] for lp in seq.logprobs]` are the logprobs of the sampled tokens. None if not
        requested.
        """
        columns = self.response.columns
        if columns.logprobs is None:
            return None
        values = columns.logprobs[self._tokens_at].tolist()
        if columns.logprob_tokens is None:
            return [[(token, row[0])] for token, row in zip(self.tokens, values, strict=True)]
        ids = columns.logprob_tokens[self._tokens_at].tolist()
        # The sampled token is often among the k likeliest: dict keeps its first place.
        return [list(dict(zip(tokens, row, strict=True)).items()) for tokens, row in zip(ids, values, strict=True)]

    @property
    def decoded(self) -> str:
        """Text of the tokens, special tokens kept, cut off before a stop string."""
        return self.response.columns.decoded[self.row]

    @property
    def stop_reason(self) -> StopReason:
        """Why the sample ended. length: max_tokens or the end of the context. stop: an end-of-sequence token, a stop
        string or a stop token id. abort: a weight update or a pause ended it early."""
        return STOP_REASONS[int(self.response.columns.stop_reason[self.row])]

    @property
    def seed(self) -> int | None:
        """Seed of this sample's own random stream; None if the request had none."""
        seed = int(self.response.columns.seed[self.row])
        return None if seed == NO_SEED else seed

    @property
    def engine(self) -> str:
        """Name of the engine that sampled it."""
        return self.response.columns.engine[self.row]

    @property
    def adapter(self) -> str:
        """`name@version` of the adapter that sampled it; "" for the base model."""
        return self.response.columns.adapter[self.row]

    @property
    def weight_versions(self) -> list[VersionSpan]:
        """Versions of the model's own weights that sampled it, with their spans of tokens, which cover all of them.

        More than one if weights were updated while it ran. A sample of an adapter has these in addition to `adapter`.
        """
        spans = self.response.columns.weight_versions[self.row]
        ends = [start for _, start in spans[1:]] + [int(self.response.columns.lengths[self.row])]
        return [VersionSpan(label, start, end) for (label, start), end in zip(spans, ends, strict=True)]

    @property
    def prompt_index(self) -> int:
        """Index in the call of the prompt that it continues."""
        return self.response.prompt_indices[int(self.response.columns.group[self.row])]

    @cached_property
    def new_input_feature(self) -> InputFeature:
        """The prompt and this sample as one training input; the input's other keys are copied over.

        `labels` are rolled left by one: position t holds the token to predict there, IGNORED_LABEL outside the samples.
        Labels of the input are kept. The assistant's turn is appended to a trajectory's `messages`, and `encoded` says
        which messages the tokens cover. Passed as an input again, it is continued token by token. Follows Twinkle's
        samplers. Arrays are lists of P + T numbers.

        Raises:
            ValueError: the call was made with return_inputs=False.
            TemplateError: the template's tool parser is not registered in this process.
        """
        response = self.response
        if not response.inputs:
            raise ValueError("new_input_feature continues an input, and the call was made with return_inputs=False.")
        number = int(response.columns.group[self.row])
        turn = response.turns[number] if response.turns else Turn()
        prompt = response.prompts[number].tolist()
        learnt = [IGNORED_LABEL] * len(prompt) if turn.labels is None else turn.labels.tolist()
        learnt += self.tokens
        length = len(prompt) + len(self.tokens)
        source = response.inputs[number]
        feature = copy.deepcopy({key: value for key, value in source.items() if key not in OWN_COLUMNS})
        feature |= {"input_ids": prompt + self.tokens, "labels": [*learnt[1:], IGNORED_LABEL]}
        feature |= grown_columns(source, length)
        if not is_absent(source.get("messages")):
            tools = source.get("tools")
            messages, start = self._with_message(as_items(feature["messages"]) or [], tools, turn, len(prompt))
            feature["messages"] = messages
            feature["encoded"] = Encoded(
                ids=length,
                checksum=ids_checksum(response.prompts[number], self.token_array),
                messages=[*map(checksum, messages)],
                tools=tools_checksum(tools),
                assistant_start=start,
            )
            if turn.written is not None:
                feature["encoded"]["written"] = turn.written
        return cast(InputFeature, feature)

    def _with_message(
        self, messages: list[ChatMessage], tools: object, turn: Turn, prompt_length: int
    ) -> tuple[list[ChatMessage], int]:
        """Returns the messages with this sample's, and where its tokens begin. A sample without tokens adds none."""
        start = prompt_length if turn.resumed_at is None else turn.resumed_at
        if not self.tokens:
            return messages, start
        before = messages if turn.resumed_at is None else messages[:-1]
        known: Tools = () if is_absent(tools) else plain(tools)
        message = self.response.parser.message(turn.opening + self.decoded, known, len(before))
        if turn.written is not None:  # other keys of a message that the caller began
            message = {key: messages[-1][key] for key in messages[-1] if key not in ("content", "tool_calls")} | message
        return [*before, message], start

    def __repr__(self) -> str:
        return f"SampledSequence({self.decoded!r}, {len(self.token_array)} tokens, {self.stop_reason})"
