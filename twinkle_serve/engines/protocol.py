"""The interface of an engine, which vllm, torch and fake implement, and functions that they share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.data_format.samples import (
    NO_SEED,
    STOP_REASONS,
    FloatArray,
    PartialSample,
    PromptScores,
    SampleColumns,
    SamplingMask,
    StopReason,
)
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.data_format.telemetry import EngineLoad
from twinkle_serve.data_format.weights import Bucket, PauseMode, Spans
from twinkle_serve.engines.stages import OnStage, ignore_stage
from twinkle_serve.errors import EngineArgsError, WeightsError, unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """New tokens of a streamed sample."""

    tokens: Sequence[int]
    stop_reason: StopReason | None = None
    """Set on the last item; None before."""
    by_stop_string: bool = False
    """Set on the last item: whether a stop string ended the sample, and so cuts its text. An end-of-sequence token
    whose text equals a stop string does not count."""


StagedBucket: TypeAlias = Bucket | Path
"""A bucket as an engine loads it: in memory, or a file."""


class WeightsReceiver(Protocol):
    """Takes weights from a trainer itself: vLLM's weight transfer engine in the workers of an engine.

    Calls come in the order of the methods, while the engine is paused; after a failure, `start` or a load begins anew.
    Each raises WeightsError where it is refused, and EngineDeadError where the engine is gone.
    """

    async def init(self, info: Any, workers: range) -> None:
        """Connects to a trainer.

        Args:
            info: from the trainer's side of the backend, which expects a single engine.
            workers: numbers of this engine's workers among those of all engines.
        """

    async def start(self) -> None:
        """Begins to replace the weights."""

    async def update(self, info: Any, workers: range) -> None:
        """Takes some weights. Arguments as `init`."""

    async def finish(self, label: str, digests: Mapping[str, str]) -> str:
        """Ends the replacement; see `Engine.load_weights`. Returns its checksum.

        Args:
            digests: of all weights that must have come; see `weight_digest`.

        Raises:
            WeightsError: others came.
        """
        ...


def compare_digests(came: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises WeightsError for weights that came otherwise than they were stored."""
    if not (wrong := sorted(name for name in came.keys() | wanted.keys() if came.get(name) != wanted.get(name))):
        return
    first = wrong[0]
    how = "differs" if first in came and first in wanted else "did not come" if first in wanted else "is unknown"
    raise WeightsError(
        f"{len(wrong)} of the {len(came)} weights from the trainer are not those of the {len(wanted)} in the store: "
        f"{first!r} {how}. Send both from the same tensors, and change none until update_weights has returned."
    )


class Engine(Protocol):
    """Samples groups of one model.

    Guarantees:
        A group comes back whole, `count` samples in order, or the call raises.
        Cancelling the call aborts the group and no other.
        With a seed, a sample does not depend on the rest of the batch.
        A group with an adapter is sampled by that version's weights, or the call raises.
        A sample that has run for `sample_timeout_s` ends where it is, with stop_reason abort.
    Does not guarantee:
        The order in which groups finish.
    """

    info: EngineInfo
    """Set by `start`."""

    @property
    def receiver(self) -> WeightsReceiver | None:
        """Takes weights that a trainer sends to the engine itself; None: it takes them from the store alone."""

    async def start(self, on_stage: OnStage = ignore_stage) -> None:
        """Loads the model. Raises EngineArgsError, ModelNotFoundError or EngineStartError.

        Args:
            on_stage: called with "loading" once the libraries are imported.
        """

    async def sample_group(self, group: Group) -> SampleColumns:
        """Samples one group. Raises RequestError for an unsupported request, EngineDeadError if the engine is gone."""
        ...

    def partial_output(self, group: Group, offset: int, sample: int = 0) -> PartialSample | None:
        """Returns the tokens of a running sample, from token `offset` on, where the group is readable.

        Returns None once the sample has ended; the tokens of a running sample therefore never include one that ends it.
        The samples of a greedy group are one.

        Args:
            sample: index of the sample in the group.
        """
        ...

    def stream_tokens(self, group: Group) -> AsyncGenerator[TokenDelta, None]:
        """Samples a group of one sample and yields its tokens as they arrive; the last item has a stop reason.

        Raises as `sample_group`. Closing the iterator aborts the sample.
        """
        ...

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decodes tokens to text."""
        ...

    async def check_structured(self, structured: StructuredOutputs) -> None:
        """Checks that samples can be held to it, within seconds and bounded memory.

        Raises:
            SamplingParamsError: they cannot.
        """

    async def load_adapter(self, version: AdapterVersion, files: AdapterFiles) -> None:
        """Loads an adapter version beside the loaded ones.

        Raises:
            AdapterError: LoRA is off, the rank is too large, or the model lacks a module of it. Nothing is loaded.
        """

    async def drop_adapter(self, version: AdapterVersion) -> None:
        """Unloads an adapter version that no group uses."""

    async def pause(self, mode: PauseMode) -> None:
        """Stops sampling until `resume`; returns when it has stopped. Calling it again changes the mode.

        New groups wait. With `abort`, samples without a token yet are not aborted, and wait too.
        """

    async def resume(self) -> None:
        """Ends a pause."""

    def stage_weights(self, buckets: AsyncGenerator[Bucket, None]) -> AsyncGenerator[StagedBucket, None]:
        """Yields buckets as `load_weights` takes them. The engine may sample meanwhile."""
        ...

    async def load_weights(self, label: str, buckets: AsyncIterable[StagedBucket]) -> str:
        """Replaces the model's own weights, all that its checkpoint names. The engine must be paused.

        Drops the prefix cache and the KV cache of running samples, which are recomputed. Adapters stay loaded. If it
        raises, the engine holds no version until another load succeeds.

        Args:
            label: stamped on samples from now on.
            buckets: from `stage_weights`.

        Returns:
            A checksum of the loaded weights, the same on every engine of the same kind and arguments.

        Raises:
            WeightsError: the engine refuses the weights.
            EngineDeadError: the engine is gone.
        """
        ...

    async def reset_prefix_cache(self) -> None:
        """Drops the cached keys and values of earlier prompts, if any."""

    async def sleep(self, level: int) -> None:
        """Frees device memory: level 1 keeps the weights in host memory, level 2 drops them. Nothing may be running.

        Raises:
            UnsupportedError: not available for this engine on this device.
        """

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        """Ends `sleep`. The tags "weights" and "kv_cache" wake only these; None wakes everything."""

    def progress(self) -> int:
        """Changes whenever tokens are produced."""
        ...

    async def load(self) -> EngineLoad:
        """Returns its load now, or that of the last answer where the engine is busy. Returns within a second."""
        ...

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine can no longer sample."""

    async def stop(self) -> None:
        """Frees all resources. Nothing may be called afterwards."""


def columns_of_group(
    group: Group,
    engine: str,
    tokens: Sequence[Sequence[int] | NDArray[np.int32]],
    decoded: list[str],
    stop_reasons: Iterable[StopReason],
    logprobs: FloatArray | None,
    logprob_tokens: NDArray[np.int32] | None,
    scores: PromptScores | None,
    weight_versions: Sequence[Spans],
    *,
    whole_text: list[str] | None = None,
    masks: Sequence[SamplingMask | None] | None = None,
) -> SampleColumns:
    """Builds the columns of a finished group. `tokens` holds `group.count` sequences; the rest as in SampleColumns.

    Args:
        scores: of all positions of the prompt.
    """
    assert len(tokens) == len(decoded) == group.count, (len(tokens), len(decoded), group.count)
    seeds = [group.seed_of(j) for j in range(group.count)]
    return SampleColumns(
        group=np.full(group.count, group.id, np.int64),
        sample=np.arange(group.first_sample, group.first_sample + group.count, dtype=np.int32),
        lengths=np.array([len(row) for row in tokens], np.int32),
        tokens=np.concatenate([np.asarray(row, np.int32) for row in tokens]),
        logprobs=logprobs,
        logprob_tokens=logprob_tokens,
        stop_reason=np.array([STOP_REASONS.index(reason) for reason in stop_reasons], np.uint8),
        decoded=decoded,
        seed=np.array([NO_SEED if seed is None else seed for seed in seeds], np.int64),
        engine=[engine] * group.count,
        adapter=["" if group.adapter is None else group.adapter.label] * group.count,
        weight_versions=list(weight_versions),
        scores={} if scores is None else {group.id: scores.since(group.params.prompt_logprobs_start)},
        whole_text=whole_text,
        masks=None if masks is None else [*masks],
    )


ArgsT = TypeVar("ArgsT", bound=BaseModel)


def parse_engine_args(model: type[ArgsT], kind: str, engine_args: Mapping[str, object]) -> ArgsT:
    """Validates `engine_args` with the model of an engine's arguments.

    Raises:
        EngineArgsError
    """
    for name in engine_args:
        if name not in model.model_fields:
            raise EngineArgsError(unknown_name(f"{kind} engine argument", name, model.model_fields) + ".")
    try:
        return model.model_validate(dict(engine_args))
    except ValidationError as error:
        first = error.errors()[0]
        raise EngineArgsError(f"engine_args.{first['loc'][0]}={first['input']!r}: {first['msg']}.") from None


def max_new_tokens(info: EngineInfo, group: Group) -> int:
    """Returns the token limit of each sample of the group: max_tokens, or less where the context ends first."""
    room = info.max_model_len - len(group.prompt_ids)
    return room if group.params.max_tokens is None else min(group.params.max_tokens, room)
