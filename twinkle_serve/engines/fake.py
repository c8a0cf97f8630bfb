"""The fake engine: a deterministic toy model, for tests of everything above an engine.

Its "model" maps a hash of all tokens so far to one of a few fixed rows of logits, so that every token depends on the
whole prefix, logprobs re-score exactly, and nothing has to be loaded. An adapter adds noise that its weights seed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import zlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from twinkle_serve.adapters import describe_adapter, not_in_model
from twinkle_serve.checkpoint import weight_shapes
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.data_format.samples import FloatArray, PromptScores, SampleColumns, StopReason
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.engines.base import TokenDelta, columns_of_group, most_new_tokens, parse_engine_args, stop_cut
from twinkle_serve.errors import EngineError

ROWS = 257
"""Distinct next-token distributions of the toy model."""


class FakeArgs(BaseModel):
    """What `engine_args` holds for the fake engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_model_len: PositiveInt = 1024
    max_num_seqs: PositiveInt = 256
    max_logprobs: PositiveInt = 20
    enable_lora: bool = True
    max_lora_rank: PositiveInt = 16
    token_latency_s: NonNegativeFloat = 0.0
    """Time that each token of a sample takes; samples of a group run side by side."""


def check_engine_args(engine_args: Mapping[str, Any]) -> FakeArgs:
    """The arguments, parsed; see `parse_engine_args`."""
    return parse_engine_args(FakeArgs, "fake", engine_args)


class FakeEngine:
    """A toy model with the tokenizer of a real one. See `Engine` for what is guaranteed."""

    info: EngineInfo

    def __init__(self, name: str, model: str, engine_args: Mapping[str, Any]) -> None:
        self._name = name
        self._path = Path(model)
        self._args = check_engine_args(engine_args)
        self._slots = asyncio.Semaphore(self._args.max_num_seqs)
        self._adapters: dict[int, FloatArray] = {}
        """What each adapter version adds to the logits, by its id."""
        self._asleep = False

    async def start(self) -> None:
        from tokenizers import Tokenizer

        config = json.loads((self._path / "config.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(self._path / "tokenizer.json"))
        self._eos = config["eos_token_id"]
        self._weights = weight_shapes(self._path)
        vocab_size = config["vocab_size"]
        table = np.random.default_rng(0).normal(0.0, 2.0, (ROWS, vocab_size))
        table[:, self._tokenizer.get_vocab_size() :] = -30.0
        self._logits = table.astype(np.float32)
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
        )

    def _logits_of(self, adapter: AdapterVersion | None) -> FloatArray:
        """The model's table, shape [ROWS, V], with what the adapter adds."""
        if self._asleep:
            raise EngineError(f"{self._name} is asleep.")
        if adapter is None:
            return self._logits
        return self._logits + self._adapters[adapter.id]

    async def sample_group(self, group: Group) -> SampleColumns:
        params = group.params
        table = self._logits_of(group.adapter)
        samples = []
        async with self._slots:
            for j in range(group.count):
                samples.append(self._sample(group, group.seed_of(j), table))
                await asyncio.sleep(0)
            if self._args.token_latency_s:
                await asyncio.sleep(self._args.token_latency_s * max(len(tokens) for tokens, *_ in samples))
        tokens, logprobs, top_tokens, reasons, texts = map(list, zip(*samples, strict=True))
        k = params.logprobs
        return columns_of_group(
            group,
            self._name,
            tokens,
            texts,
            reasons,
            None if k is None else np.concatenate(logprobs),
            None if not k else np.concatenate(top_tokens),
            None if params.prompt_logprobs is None else _score(group.prompt_ids, params.prompt_logprobs, table),
        )

    async def stream_tokens(self, group: Group) -> AsyncGenerator[TokenDelta, None]:
        async with self._slots:
            tokens, _, _, reason, text = self._sample(group, group.seed_of(0), self._logits_of(group.adapter))
            for token in tokens[:-1].tolist():
                await asyncio.sleep(self._args.token_latency_s)
                yield TokenDelta(tokens=[token])
            await asyncio.sleep(self._args.token_latency_s)
            cut = text != self.decode(tokens.tolist())
            yield TokenDelta(tokens=tokens[-1:].tolist(), stop_reason=reason, by_stop_string=cut)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _sample(
        self, group: Group, seed: int | None, table: FloatArray
    ) -> tuple[NDArray[np.int32], FloatArray, NDArray[np.int32], StopReason, str]:
        params = group.params
        rng = np.random.default_rng(seed)
        state = zlib.crc32(group.prompt_ids.astype(np.int32).tobytes())
        k = params.logprobs or 0
        tokens: list[int] = []
        logprobs, top_tokens = [], []
        reason: StopReason = "length"
        cut: str | None = None
        for _ in range(most_new_tokens(self.info, group)):
            raw = table[state % ROWS]
            token = _draw(raw, params, group.prompt_ids, tokens, rng)
            state = zlib.crc32(np.int32(token).tobytes(), state)
            tokens.append(token)
            likely = _log_softmax(raw)
            top = np.argsort(-likely, kind="stable")[:k]
            logprobs.append(np.concatenate([likely[token : token + 1], likely[top]]))
            top_tokens.append(np.concatenate([[token], top]))
            if token in params.stop_token_ids or (token == self._eos and not params.ignore_eos):
                reason = "stop"
                break
            if params.stop_strings:
                text = self._tokenizer.decode(tokens, skip_special_tokens=False)
                if (end := stop_cut(text, params.stop_strings)) is not None:
                    reason, cut = "stop", text[:end]
                    break
        return (
            np.array(tokens, np.int32),
            np.array(logprobs, np.float32).reshape(-1, 1 + k),
            np.array(top_tokens, np.int32).reshape(-1, 1 + k),
            reason,
            self._tokenizer.decode(tokens, skip_special_tokens=False) if cut is None else cut,
        )

    async def load_adapter(self, version: AdapterVersion, files: AdapterFiles) -> None:
        adapter = describe_adapter(files)
        if left_out := {module for module in adapter.modules if f"{module}.weight" not in self._weights}:
            raise not_in_model(left_out)
        rng = np.random.default_rng(adapter.checksum)
        self._adapters[version.id] = rng.normal(0.0, 1.0, self._logits.shape).astype(np.float32)

    async def drop_adapter(self, version: AdapterVersion) -> None:
        self._adapters.pop(version.id, None)

    async def reset_prefix_cache(self) -> None:
        pass

    async def sleep(self, level: int) -> None:
        self._asleep = True

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        self._asleep = False

    async def check_health(self) -> None:
        pass

    async def stop(self) -> None:
        pass


def _score(prompt_ids: NDArray[np.int32], k: int, table: FloatArray) -> PromptScores:
    state = 0
    rows = [np.full(1 + k, np.nan, np.float32)]
    tokens = [np.full(k, -1, np.int32)]
    for before, token in itertools.pairwise(prompt_ids):
        state = zlib.crc32(np.int32(before).tobytes(), state)
        likely = _log_softmax(table[state % ROWS])
        top = np.argsort(-likely, kind="stable")[:k].astype(np.int32)
        rows.append(np.concatenate([likely[token : token + 1], likely[top]]))
        tokens.append(top)
    values = np.stack(rows)
    return PromptScores(logprobs=values[:, 0], top_tokens=np.stack(tokens), top_logprobs=values[:, 1:])


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max()
    result: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return result


def _draw(
    raw: FloatArray, params: SamplingParams, prompt: Sequence[int] | NDArray[np.int32], tokens: list[int], rng: Any
) -> int:
    """One token; the steps and their order are vLLM's."""
    logits = raw
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate([np.asarray(prompt, np.int64), np.asarray(tokens, np.int64)]))
        logits = raw.copy()
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.greedy:
        return int(logits.argmax())
    logits = logits / params.temperature
    if 0 < params.top_k < len(logits):
        logits = np.where(logits < np.partition(logits, -params.top_k)[-params.top_k], -np.inf, logits)
    probabilities = np.exp(_log_softmax(logits))
    if params.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0.0
    return int((probabilities / rng.standard_exponential(len(probabilities))).argmax())
