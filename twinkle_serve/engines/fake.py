"""The fake engine: a deterministic toy model, for tests of everything above an engine.

Its "model" maps a hash of all tokens so far to one of a few fixed rows of logits, so that every token depends on the
whole prefix, logprobs re-score exactly, and there is nothing to load. An adapter adds noise seeded by its weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from twinkle_serve.adapter_description import describe_adapter, not_in_model
from twinkle_serve.checkpoint import weight_shapes
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group
from twinkle_serve.data_format.samples import (
    FloatArray,
    PartialSample,
    PromptScores,
    SampleColumns,
)
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.data_format.telemetry import EngineLoad
from twinkle_serve.data_format.weights import INITIAL_LABEL, Bucket, PauseMode
from twinkle_serve.engines.drawing import DrawnSample, columns_of_samples
from twinkle_serve.engines.logits import LogitsProcessor, log_softmax, softmax
from twinkle_serve.engines.protocol import (
    StagedBucket,
    TokenDelta,
    WeightsReceiver,
    max_new_tokens,
    parse_engine_args,
)
from twinkle_serve.engines.stages import OnStage, ignore_stage
from twinkle_serve.errors import EngineError, SamplingParamsError, WeightsError

ROWS = 257
"""Number of distinct next-token distributions of the toy model."""

LACKS = {
    "structured_outputs": "the fake engine has no grammars. Use engine: vllm.",
    "thinking_token_budget": "the fake engine does not think. Use engine: vllm.",
}


class FakeArgs(BaseModel):
    """`engine_args` of the fake engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_model_len: PositiveInt = 1024
    max_num_seqs: PositiveInt = 256
    max_logprobs: PositiveInt = 20
    enable_lora: bool = True
    max_lora_rank: PositiveInt = 16
    token_latency_s: NonNegativeFloat = 0.0
    """Time per token of a sample; the samples of a group run in parallel."""


def check_engine_args(engine_args: Mapping[str, object]) -> FakeArgs:
    """Parses the arguments; see `parse_engine_args`."""
    return parse_engine_args(FakeArgs, "fake", engine_args)


class FakeEngine:
    """Runs groups on a toy model with a real model's tokenizer. See `Engine` for the guarantees."""

    info: EngineInfo
    receiver: WeightsReceiver | None = None

    def __init__(self, name: str, model: str, engine_args: Mapping[str, object]) -> None:
        self._name = name
        self._path = Path(model)
        self._args = check_engine_args(engine_args)
        self._slots = asyncio.Semaphore(self._args.max_num_seqs)
        self._adapters: dict[int, FloatArray] = {}
        """Added to the logits by each adapter version, by version id. Shape [ROWS, V]."""
        self._asleep = False
        self._label = INITIAL_LABEL
        self._sampling = 0
        """Number of running groups."""
        self._idle, self._resumed, self._not_held = asyncio.Event(), asyncio.Event(), asyncio.Event()
        """Set while nothing runs; while new groups may start; while running groups may continue."""
        for event in (self._idle, self._resumed, self._not_held):
            event.set()
        self._aborting = False
        self._progress = 0
        self._computed_tokens = 0
        self._followed: dict[Attempt, list[_Sample]] = {}
        """Running samples of groups that are followed."""

    async def start(self, on_stage: OnStage = ignore_stage) -> None:
        from tokenizers import Tokenizer

        on_stage("loading")
        config = json.loads((self._path / "config.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(self._path / "tokenizer.json"))
        self._eos = config["eos_token_id"]
        self._weights = weight_shapes(self._path)
        vocab_size = config["vocab_size"]
        table = np.random.default_rng(0).normal(0.0, 2.0, (ROWS, vocab_size))
        table[:, self._tokenizer.get_vocab_size() :] = -30.0
        self._logits = self._initial = table.astype(np.float32)
        self.info = EngineInfo(
            name=self._name,
            kind="fake",
            max_model_len=self._args.max_model_len,
            scores_full_context=True,
            vocab_size=vocab_size,
            max_num_seqs=self._args.max_num_seqs,
            max_logprobs=self._args.max_logprobs,
            logprobs_mode="raw_logprobs",
            device="cpu",
            cpus=(),
            max_lora_rank=self._args.max_lora_rank if self._args.enable_lora else 0,
            eos_token_ids=(self._eos,),
            lacks=LACKS,
        )

    def _logits_of(self, adapter: AdapterVersion | None) -> FloatArray:
        """Returns the model's logits, with the adapter's added. Shape [ROWS, V]."""
        if self._asleep:
            raise EngineError(f"{self._name} is asleep.")
        if adapter is None:
            return self._logits
        return self._logits + self._adapters[adapter.id]

    async def sample_group(self, group: Group) -> SampleColumns:
        params = group.params
        samples = [self._new_sample(group, j) for j in range(group.count)]
        async with self._running():
            self._computed_tokens += len(group.prompt_ids)
            scores = None
            if params.prompt_logprobs is not None:
                self._progress += 1
                scores = _score(group.prompt_ids, params.prompt_logprobs, self._logits_of(group.adapter))
            if group.is_readable:
                self._followed[group.attempt] = samples
            try:
                async for _ in self._steps(group, samples):
                    pass
            finally:
                self._followed.pop(group.attempt, None)
        for sample in samples:
            sample.weight_versions = sample.weight_versions or [(self._label, 0)]
        return columns_of_samples(group, self._name, samples, scores, self.decode)

    async def check_structured(self, structured: StructuredOutputs) -> None:
        raise SamplingParamsError(f"structured_outputs is not available: {LACKS['structured_outputs']}")

    def partial_output(self, group: Group, offset: int, sample: int = 0) -> PartialSample | None:
        samples = self._followed.get(group.attempt)
        return None if samples is None else samples[sample].partial(offset)

    async def stream_tokens(self, group: Group) -> AsyncGenerator[TokenDelta, None]:
        sample = self._new_sample(group, 0)
        async with self._running():
            async for _ in self._steps(group, [sample]):
                yield TokenDelta(
                    tokens=sample.tokens[-1:],
                    stop_reason=sample.stop_reason,
                    by_stop_string=sample.by_stop_string,
                )
            if not sample.tokens:
                yield TokenDelta(tokens=[], stop_reason="length")

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[None, None]:
        """Waits for a free slot and the end of a pause, then holds the slot."""
        async with self._slots:
            await self._resumed.wait()
            self._sampling += 1
            self._idle.clear()
            try:
                yield
            finally:
                self._sampling -= 1
                if not self._sampling:
                    self._idle.set()

    async def _steps(self, group: Group, samples: Sequence[_Sample]) -> AsyncGenerator[None, None]:
        """Advances all samples in parallel, by one token per step."""
        clock = asyncio.get_running_loop().time
        end = math.inf if group.sample_timeout_s is None else clock() + group.sample_timeout_s
        while unfinished := [sample for sample in samples if sample.stop_reason is None and sample.max_tokens]:
            await asyncio.sleep(self._args.token_latency_s)
            await self._not_held.wait()
            table = self._logits_of(group.adapter)
            for sample in unfinished:
                sample.step(table, self._label, aborted=self._aborting or clock() >= end)
            self._progress += len(unfinished)
            yield

    def _new_sample(self, group: Group, j: int) -> _Sample:
        return _Sample(
            params=group.params,
            process=LogitsProcessor(group.params, group.prompt_ids, [self._eos], self._encode),
            logprobs_mode=group.params.logprobs_mode or "raw_logprobs",
            max_tokens=max_new_tokens(self.info, group),
            rng=np.random.default_rng(group.seed_of(j)),
            state=zlib.crc32(group.prompt_ids.astype(np.int32).tobytes()),
            eos=[self._eos],
            decode=self.decode,
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    async def load_adapter(self, version: AdapterVersion, files: AdapterFiles) -> None:
        adapter = describe_adapter(files)
        if missing := {module for module in adapter.modules if f"{module}.weight" not in self._weights}:
            raise not_in_model(missing)
        rng = np.random.default_rng(adapter.checksum)
        self._adapters[version.id] = rng.normal(0.0, 1.0, self._logits.shape).astype(np.float32)

    async def drop_adapter(self, version: AdapterVersion) -> None:
        self._adapters.pop(version.id, None)

    async def pause(self, mode: PauseMode) -> None:
        self._resumed.clear()
        if mode == "keep":
            self._not_held.clear()
            return
        self._not_held.set()
        self._aborting = mode == "abort"
        try:
            await self._idle.wait()
        finally:
            self._aborting = False

    async def resume(self) -> None:
        self._not_held.set()
        self._resumed.set()

    def stage_weights(self, buckets: AsyncGenerator[Bucket, None]) -> AsyncGenerator[StagedBucket, None]:
        return buckets

    async def load_weights(self, label: str, buckets: AsyncIterable[StagedBucket]) -> str:
        tensors: dict[str, int] = {}
        async for bucket in buckets:
            assert not isinstance(bucket, Path)
            for name, tensor in safetensors.deserialize(bucket.tobytes()):  # type: ignore[no-untyped-call]
                if tuple(tensor["shape"]) != self._weights.get(name, tuple(tensor["shape"])):
                    raise WeightsError(f"weight {name!r} has the shape {tensor['shape']}, not {self._weights[name]}.")
                tensors[name] = zlib.crc32(tensor["data"])
        checksum = zlib.crc32(json.dumps(tensors, sort_keys=True).encode())
        self._logits = self._initial
        if label != INITIAL_LABEL:
            noise = np.random.default_rng(checksum).normal(0.0, 1.0, self._initial.shape)
            self._logits = self._initial + noise.astype(np.float32)
        self._label = label
        return f"{checksum:08x}"

    async def reset_prefix_cache(self) -> None:
        pass

    async def sleep(self, level: int) -> None:
        self._asleep = True
        if level == 2:
            self._logits = np.zeros_like(self._initial)

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        self._asleep = False

    def progress(self) -> int:
        return self._progress

    async def load(self) -> EngineLoad:
        return EngineLoad(running=self._sampling, computed_tokens=self._computed_tokens)

    async def check_health(self) -> None:
        pass

    async def stop(self) -> None:
        pass


@dataclass(slots=True, kw_only=True)
class _Sample(DrawnSample):
    """A sample of the toy model."""

    rng: np.random.Generator
    state: int
    """Hash of the prompt and all tokens so far."""

    def step(self, table: FloatArray, label: str, *, aborted: bool) -> None:
        """Draws the next token."""
        self.sampled_by(label)
        raw = table[self.state % ROWS]
        logits = self.process(raw, self.tokens)
        token = self._draw(logits)
        self.state = zlib.crc32(np.int32(token).tobytes(), self.state)
        self.add(token, raw, logits)
        self.end(aborted=aborted)

    def _draw(self, logits: FloatArray) -> int:
        if self.params.greedy:
            return int(logits.argmax())
        return int((softmax(logits) / self.rng.standard_exponential(len(logits))).argmax())


def _score(prompt_ids: NDArray[np.int32], k: int, table: FloatArray) -> PromptScores:
    state = 0
    rows = [np.full(1 + k, np.nan, np.float32)]
    tokens = [np.full(k, -1, np.int32)]
    for before, token in itertools.pairwise(prompt_ids):
        state = zlib.crc32(np.int32(before).tobytes(), state)
        logprobs = log_softmax(table[state % ROWS])
        top = np.argsort(-logprobs, kind="stable")[:k].astype(np.int32)
        rows.append(np.concatenate([logprobs[token : token + 1], logprobs[top]]))
        tokens.append(top)
    values = np.stack(rows)
    return PromptScores(logprobs=values[:, 0], top_tokens=np.stack(tokens), top_logprobs=values[:, 1:])
