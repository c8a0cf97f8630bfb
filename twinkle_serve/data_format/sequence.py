"""One sample of a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.samples import NO_SEED, STOP_REASONS, FloatArray, SampleColumns, SamplingMask, StopReason
from twinkle_serve.data_format.weights import VersionSpan

if TYPE_CHECKING:
    from twinkle_serve.data_format.response import SampleResponse


class SampledSequence:
    """One sample. Those of a call are views of its response's columns; one made by hand keeps what it is given."""

    response: SampleResponse
    """The response that the sample is part of. A sample made by hand has none, nor `row` and `start`."""
    row: int
    """Index of the sample in the response's columns."""
    start: int
    """Index of its first token in the column `tokens`."""
    routed_experts: Any = None
    """As given to the constructor; None in the samples of a call."""

    def __init__(
        self,
        stop_reason: StopReason,
        tokens: list[int],
        logprobs: list[list[tuple[int, float]]] | None = None,
        decoded: str | None = None,
        new_input_feature: Mapping[str, Any] | None = None,
        routed_experts: Any = None,
    ) -> None:
        """Makes a sample by hand, for a sampler of your own; see the attributes."""
        vars(self).update(  # these stand for the cached properties
            stop_reason=stop_reason,
            tokens=tokens,
            logprobs=logprobs,
            decoded=decoded,
            new_input_feature=new_input_feature,
            routed_experts=routed_experts,
        )

    @cached_property
    def stop_reason(self) -> StopReason:
        """Why the sample ended. length: max_tokens or the end of the context. stop: an end-of-sequence token, a stop
        string or a stop token id. abort: a weight update or a pause ended it early."""
        raise NotImplementedError

    @cached_property
    def tokens(self) -> list[int]:
        """Sampled token ids, prompt excluded. T of them."""
        raise NotImplementedError

    @cached_property
    def logprobs(self) -> list[list[tuple[int, float]]] | None:
        """(token id, log p) at each position, nats: the sampled token, then the others of the k likeliest, best first,
        then those of logprob_token_ids that are not among them.

        T lists of up to 1 + k + n; None if not requested. `[lp[0][1] for lp in seq.logprobs]` are the logprobs of the
        sampled tokens.
        """
        raise NotImplementedError

    @cached_property
    def decoded(self) -> str:
        """Text of the tokens, cut off before a stop string, special tokens kept; include_stop_str_in_output and
        skip_special_tokens change that."""
        raise NotImplementedError

    @property
    def whole_text(self) -> str:
        """`decoded` with special tokens: what the template's parser reads."""
        return self.decoded

    @property
    def sampling_mask(self) -> SamplingMask | None:
        """The tokens that could be sampled at each position; None without return_sampling_mask."""
        return None

    @cached_property
    def new_input_feature(self) -> Any:
        """The prompt and this sample as one training input, an InputFeature; the input's other keys are copied over.

        `labels` are rolled left by one: position t holds the token to predict there, IGNORED_LABEL outside the samples.
        Labels of the input are kept. `logprobs` are aligned with them: log p of each label, nats, under
        `SampleResponse.logprobs_mode`; 0.0 where there is no label or its logprob is unknown, as of labels that the
        caller gave without logprobs. The key is missing if neither the call nor its input has logprobs.
        `weight_versions` are the sampled tokens in `input_ids`, of earlier turns too, as a list of
        `{"weights": label, "adapter": name@version or "", "start": index, "end": index after the last}`.

        The assistant's turn is appended to a trajectory's `messages`, and `encoded` says which messages the tokens
        cover. Passed as an input again, it is continued token by token. Follows Twinkle's samplers; where defaults are
        Twinkle's, `logprobs` and `weight_versions` are there only if the input has them. Arrays are lists of P + T
        numbers.

        Raises:
            ValueError: the call was made with return_inputs=False.
            TemplateError: the template's tool parser is not registered in this process.
        """
        raise NotImplementedError

    @cached_property
    def seed(self) -> int | None:
        """Seed of this sample's own random stream; None if the request had none."""
        return None

    @cached_property
    def engine(self) -> str:
        """Name of the engine that sampled it."""
        return ""

    @cached_property
    def adapter(self) -> str:
        """`name@version` of the adapter that sampled it; "" for the base model."""
        return ""

    @cached_property
    def weight_versions(self) -> list[VersionSpan]:
        """Versions of the model's own weights that sampled it, with their spans of tokens, which cover all of them.

        More than one if weights were updated while it ran. A sample of an adapter has these in addition to `adapter`.
        """
        return []

    @cached_property
    def prompt_index(self) -> int:
        """Index in the call of the prompt that it continues."""
        return 0

    @property
    def token_array(self) -> NDArray[np.int32]:
        """Sampled token ids, prompt excluded. Shape [T], int32."""
        return np.asarray(self.tokens, np.int32)

    @property
    def logprob_array(self) -> FloatArray | None:
        """Log p of each sampled token, nats, under `SampleResponse.logprobs_mode`. Shape [T]; None if not requested."""
        if self.logprobs is None:
            return None
        if len(self.logprobs) != len(self.tokens):
            raise ValueError(f"the sample has {len(self.tokens)} tokens and {len(self.logprobs)} logprobs.")
        if self.tokens and np.ndim(self.logprobs[0]) == 0:  # made by hand, with one number a token
            return np.asarray(self.logprobs, np.float32)
        rows = [(token, dict(row)) for token, row in zip(self.tokens, self.logprobs, strict=True)]
        if missing := [token for token, row in rows if token not in row]:
            raise ValueError(f"the sample's logprobs do not have that of its token {missing[0]}.")
        return np.asarray([row[token] for token, row in rows], np.float32)

    def __eq__(self, other: object) -> bool:
        """Compares how the samples ended, their tokens, logprobs and text, and their training inputs.

        What sampled them makes no difference: seed, engine, and versions of weights and adapter.
        """
        if not isinstance(other, SampledSequence):
            return NotImplemented
        names = ("stop_reason", "tokens", "logprobs", "decoded", "routed_experts", "_feature")
        return all(same(getattr(self, name), getattr(other, name)) for name in names)

    def __hash__(self) -> int:
        return hash((self.stop_reason, tuple(self.tokens)))

    @property
    def _feature(self) -> object:
        return _without_versions(self.new_input_feature)

    def __repr__(self) -> str:
        return f"SampledSequence({self.decoded!r}, {len(self.tokens)} tokens, {self.stop_reason})"


def _without_versions(feature: object) -> object:
    """Returns a feature without the versions that sampled it, for comparisons."""
    if not isinstance(feature, Mapping):
        return feature
    return {key: value for key, value in feature.items() if key != "weight_versions"}


def same(mine: object, theirs: object) -> bool:
    """Compares values that may be, or contain, numpy arrays."""
    if isinstance(mine, np.ndarray) or isinstance(theirs, np.ndarray):
        return np.array_equal(np.asarray(mine), np.asarray(theirs))
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        return mine.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in mine.items())
    if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return bool(mine == theirs)


def columns_of(sequences: Sequence[SampledSequence]) -> SampleColumns:
    """Returns the columns of samples of one prompt: of their logprobs, those of the sampled tokens.

    Raises:
        ValueError: a sample that cannot be in columns.
    """
    count = len(sequences)
    try:
        logprobs = [sequence.logprob_array for sequence in sequences]
        scored = [values[:, None] for values in logprobs if values is not None]
        return SampleColumns(
            group=np.zeros(count, np.int64),
            sample=np.arange(count, dtype=np.int32),
            lengths=np.array([len(sequence.tokens) for sequence in sequences], np.int32),
            tokens=np.concatenate([*(sequence.token_array for sequence in sequences), np.empty(0, np.int32)]),
            logprobs=np.concatenate(scored) if count and len(scored) == count else None,
            logprob_tokens=None,
            stop_reason=np.array([STOP_REASONS.index(sequence.stop_reason) for sequence in sequences], np.uint8),
            decoded=[sequence.decoded or "" for sequence in sequences],
            seed=np.array([NO_SEED if sequence.seed is None else sequence.seed for sequence in sequences], np.int64),
            engine=[sequence.engine for sequence in sequences],
            adapter=[sequence.adapter for sequence in sequences],
            weight_versions=[
                tuple((span.version, span.start) for span in sequence.weight_versions) for sequence in sequences
            ],
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"the samples cannot be put in columns: {type(error).__name__}: {error}") from error
