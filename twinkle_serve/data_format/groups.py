"""The types that router and engines exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.sample_updates import UpdateText
from twinkle_serve.data_format.samples import PartialSample, StopReason
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.data_format.telemetry import EngineLoad
from twinkle_serve.data_format.weights import WeightsVersion

EngineKind: TypeAlias = Literal["vllm", "torch", "fake"]

GroupKey: TypeAlias = tuple[int, int]
"""(id, first sample) of a group, which tells parts of a split prompt apart."""

Attempt: TypeAlias = tuple[int, int, int]
"""A group's key and its number of earlier attempts, so that a late abort does not hit the next attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """`count` samples of one prompt, placed on one engine."""

    id: int
    """Id of the prompt, unique in the lifetime of the router."""
    prompt_ids: NDArray[np.int32]
    """Shape [P]."""
    params: DecodingParams
    first_sample: int = 0
    """Index in the prompt of the first sample; not 0 in later parts of a split prompt."""
    count: int = 1
    seed: int | None = None
    """Seed of the first sample of this group; its sample j has `seed + j`."""
    adapter: AdapterVersion | None = None
    """None for the base model."""
    sample_timeout_s: float | None = None
    """Seconds each sample may take on its engine, waiting and pauses included; then it ends with the tokens it has."""
    resume: bool = False
    """Whether samples continue from the tokens they have when their engine ends; the engine reports these if so."""
    partial: PartialSample | None = None
    """Tokens to continue from, for a group of one sample."""
    updates: UpdateText | None = None
    """Which text the engine reports, with the new tokens of its samples, while they run; None: nothing is reported."""
    attempts: int = 0
    """Number of earlier attempts."""
    urgent: bool = False
    """Whether its call returns before all prompts are complete (`min_groups`), so that each finished one counts."""
    alone: bool = False
    """Whether its call has no other prompt, so that its last sample ends the call."""
    traceparent: str = ""
    """W3C's id of the span that it is part of; "" without one."""

    @property
    def key(self) -> GroupKey:
        return (self.id, self.first_sample)

    @property
    def attempt(self) -> Attempt:
        return (self.id, self.first_sample, self.attempts)

    @property
    def is_followed(self) -> bool:
        """Whether the engine reports tokens of its samples while they run."""
        return self.resume or self.updates is not None

    @property
    def is_readable(self) -> bool:
        """Whether `Engine.partial_output` returns tokens of its samples while they run."""
        return self.is_followed or bool(self.traceparent)

    @property
    def samples(self) -> range:
        """Indices of its samples in the prompt."""
        return range(self.first_sample, self.first_sample + self.count)

    def seed_of(self, j: int) -> int | None:
        return None if self.seed is None else self.seed + j

    def part(self, first_sample: int, count: int) -> Self:
        """Returns a part of the group, whose samples keep their seeds."""
        seed = self.seed_of(first_sample - self.first_sample)
        return replace(self, first_sample=first_sample, count=count, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One router's use of one engine process, from when it is ready until it is lost."""

    incarnation: str
    """`EngineInfo.incarnation` of the process."""
    router: str
    """Id of the router."""
    epoch: int = 0
    """Increases with each session of the same router; a later one ends the earlier ones."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Groups that a router sends to an engine together."""

    session: Session
    groups: Sequence[Group]
    more: bool
    """Whether further groups wait at the router for places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """New text of a streamed sample."""

    text: str
    """Whole characters, without what may be the beginning of a stop string."""
    finish_reason: StopReason | None = None
    """None before the last delta."""
    tokens: int = 0
    """Number of tokens since the delta before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts about an engine that the router needs to admit requests."""

    name: str
    kind: EngineKind
    max_model_len: int
    """Maximum number of tokens of a prompt and its sample together."""
    scores_full_context: bool
    """Whether a prompt of max_model_len tokens can be scored; vLLM needs room for one more."""
    vocab_size: int
    """Exclusive upper limit of token ids."""
    max_num_seqs: int
    """Maximum number of sequences running at the same time."""
    max_logprobs: int
    """Maximum k of `logprobs` and `prompt_logprobs`."""
    logprobs_mode: str
    """See `SampleResponse.logprobs_mode`."""
    device: str
    """cpu or cuda."""
    cpus: tuple[int, ...]
    """Cores that its compute threads are pinned to; empty if not pinned."""
    max_lora_rank: int = 0
    """Maximum rank of an adapter; 0 if LoRA is off."""
    dtype: str = ""
    """safetensors' name of the dtype that it converts the model's floats to; "" if it keeps the checkpoint's."""
    adapter_dtype: str = ""
    """The same for adapters; "" if it keeps theirs."""
    eos_token_ids: tuple[int, ...] = ()
    """End-of-sequence ids of the model."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Sampling parameters that it does not have, and what to do instead."""
    masks_raw_logprobs: bool = False
    """Whether its raw logprobs are those under the mask of structured_outputs."""
    transfer_backend: str = ""
    """Name of the backend of vLLM's weight transfer by which it takes weights from a trainer itself; "": it takes them
    from the store alone."""
    workers: int = 1
    """Number of its processes that hold weights."""
    incarnation: str = ""
    """Id of the engine process; its replacement has another."""
    weights_version: WeightsVersion | None = None
    """Version of the model weights that it holds; None while it holds no complete one."""
    progress: int = 0
    """Changes whenever tokens are sampled or scored."""
    running: int = 0
    """Running groups, without streams, which may be waiting for their readers."""
    load: EngineLoad = field(default_factory=EngineLoad)
