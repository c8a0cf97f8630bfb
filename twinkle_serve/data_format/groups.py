"""What the router sends to an engine, and what it knows of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.adapters import AdapterVersion
from twinkle_serve.data_format.samples import PartialSample, StopReason
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.data_format.weights import WeightsVersion

GroupKey: TypeAlias = tuple[int, int]
"""(id, first sample) of a group: what tells the parts of a split prompt apart."""

Attempt: TypeAlias = tuple[int, int, int]
"""A group's key and how often it was placed before: an abort that comes late must not meet the next attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """`count` samples of one prompt: what is placed on an engine, and what an engine returns whole."""

    id: int
    """Of the prompt: unique at the router for as long as it lives."""
    prompt_ids: NDArray[np.int32]
    """Shape [P]."""
    params: SamplingParams
    """`num_samples` and `seed` are of the request: a group has `count` and `seed` of its own."""
    first_sample: int = 0
    """Index of this group's first sample among the prompt's; not 0 in the later parts of a split prompt."""
    count: int = 1
    seed: int | None = None
    """Seed of the first sample here; sample j has `seed + j`."""
    adapter: AdapterVersion | None = None
    """None is the base model."""
    sample_timeout_s: float | None = None
    """Seconds that each sample may take on its engine, waiting there and pauses included; then it ends where it is."""
    resume: bool = False
    """Whether its samples go on from where they were when their engine ends; the engine reports their tokens then."""
    partial: PartialSample | None = None
    """What there is already of the only sample of this group: it goes on from there."""
    attempts: int = 0
    """How often it was placed before."""
    lost: tuple[str, ...] = ()
    """Engines that ended with it on them, and that it may have ended."""
    crashes: int = 0
    """How many of these ended by themselves, by an error or a signal of their own, rather than from outside."""
    ran_s: float = 0.0
    """For how long it had run on the last of these."""
    urgent: bool = False
    """Whether somebody waits for each of its samples, rather than for all of its call's."""
    caller: str = ""
    """Whose it is; callers take turns."""
    index: int = 0
    """Which of its request's prompts it is of."""
    prompts: int = 1
    """Prompts of its request."""
    input: int = 0
    """Which of its call's inputs it is."""

    @property
    def key(self) -> GroupKey:
        return (self.id, self.first_sample)

    @property
    def attempt(self) -> Attempt:
        return (self.id, self.first_sample, self.attempts)

    @property
    def samples(self) -> range:
        """Indices of its samples among the prompt's."""
        return range(self.first_sample, self.first_sample + self.count)

    def seed_of(self, j: int) -> int | None:
        return None if self.seed is None else self.seed + j

    def part(self, first_sample: int, count: int) -> Group:
        """Some of its samples, with the seeds that they have here."""
        seed = self.seed_of(first_sample - self.first_sample)
        return replace(self, first_sample=first_sample, count=count, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One router's use of one engine's process, from when it is found ready until it is lost."""

    incarnation: str
    """`EngineInfo.incarnation` of the process."""
    router: str
    """Id of the router."""
    epoch: int = 0
    """Higher in later uses by the same router, which end the earlier ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """What a streamed sample has gained."""

    text: str
    """Whole characters, and nothing that may turn out to be the beginning of a stop string."""
    finish_reason: StopReason | None = None
    """Of the last delta; None in those before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the router must know to admit a request."""

    name: str
    kind: str
    """vllm, torch or fake."""
    max_model_len: int
    """Most tokens of a prompt and its sample together."""
    scores_full_context: bool
    """Whether a prompt of max_model_len tokens can be scored. vLLM needs room for one more."""
    vocab_size: int
    """Token ids are below it."""
    max_num_seqs: int
    """Most sequences that run at the same time."""
    max_logprobs: int
    """Most k of `logprobs` and `prompt_logprobs`."""
    logprobs_mode: str
    """See `SampleResponse.logprobs_mode`."""
    device: str
    """cpu or cuda."""
    cpus: tuple[int, ...]
    """Cores that its computing threads are bound to; empty where they are not."""
    max_lora_rank: int = 0
    """Largest rank of an adapter; 0 where LoRA is switched off."""
    incarnation: str = ""
    """Differs between an engine's process and the one that replaces it."""
    weights_version: WeightsVersion | None = None
    """Version of the model's own weights that it holds; None while it holds none whole."""
    progress: int = 0
    """Another number whenever it has sampled, or scored, something."""
    running: int = 0
    """Groups that it has begun and not finished, streams left out: those may wait for their readers."""
