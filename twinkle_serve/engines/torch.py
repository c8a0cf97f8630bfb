"""The torch engine: transformers' generate, batched. For debugging, and to check vllm against."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt

from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.data_format.samples import FloatArray, PromptScores, SampleColumns, StopReason
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.engines.base import columns_of_group, most_new_tokens, parse_engine_args, stop_cut
from twinkle_serve.errors import EngineArgsError, EngineDeadError, EngineError, EngineStartError

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


class TorchArgs(BaseModel):
    """What `engine_args` holds for the torch engine; named and meant as vLLM's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: PositiveInt | None = None
    """None: the model's own."""
    max_num_seqs: PositiveInt = 64
    """Rows of one batch."""
    max_logprobs: PositiveInt = 20
    logprobs_mode: LogprobsMode = "raw_logprobs"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"


def check_engine_args(engine_args: Mapping[str, Any]) -> TorchArgs:
    """The arguments, parsed; see `parse_engine_args`."""
    return parse_engine_args(TorchArgs, "torch", engine_args)


@dataclass(slots=True)
class _Row:
    """One sample in the running batch."""

    params: SamplingParams
    most_tokens: int
    generator: Any
    """torch.Generator of this sample alone."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    """Tensors of shape [1 + k]."""
    logprob_tokens: list[Any] = field(default_factory=list)
    stop_reason: StopReason | None = None
    decoded: str | None = None
    """Set where a stop string cut it."""


@dataclass(slots=True, eq=False)
class _Job:
    group: Group
    done: asyncio.Future[SampleColumns]


class TorchEngine:
    """One transformers model on one device. See `Engine` for what is guaranteed.

    A batch runs to its end before the next one starts.
    """

    info: EngineInfo

    def __init__(
        self,
        name: str,
        model: str,
        engine_args: Mapping[str, Any],
        *,
        device: str,
        cpus: Sequence[Sequence[int]] = (),
        trust_remote_code: bool = False,
    ) -> None:
        self._name = name
        self._path = model
        self._args = check_engine_args(engine_args)
        self._device = device
        self._cpus = tuple(sorted({core for cores in cpus for core in cores}))
        self._trust_remote_code = trust_remote_code
        self._waiting: list[_Job] = []
        self._batch: list[_Job] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except (OSError, ValueError) as error:
            raise EngineStartError(f"{self._name}: transformers could not load {self._path!r}: {error}") from error
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if longest is None:
            raise EngineStartError(f"{self._name}: {self._path!r} does not say how many positions its model has.")
        if self._args.max_model_len is not None and self._args.max_model_len > longest:
            raise EngineArgsError(
                f"engine_args.max_model_len={self._args.max_model_len}, the model has {longest} positions. Lower it."
            )
        self.info = EngineInfo(
            name=self._name,
            kind="torch",
            max_model_len=self._args.max_model_len or longest,
            scores_full_context=True,
            vocab_size=self._model.config.get_text_config().vocab_size,
            max_num_seqs=self._args.max_num_seqs,
            max_logprobs=self._args.max_logprobs,
            logprobs_mode=self._args.logprobs_mode,
            device=self._device,
            cpus=self._cpus,
        )
        self._loop = asyncio.create_task(self._run())

    def _load(self) -> None:
        import os

        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        if self._device == "cpu" and self._cpus:
            # Threads started from here on, torch's pool among them, inherit the binding of this one.
            os.sched_setaffinity(0, self._cpus)
            torch.set_num_threads(len(self._cpus))
        self._tokenizer = AutoTokenizer.from_pretrained(self._path, trust_remote_code=self._trust_remote_code)
        self._model = AutoModelForCausalLM.from_pretrained(
            self._path,
            dtype=self._args.dtype,
            attn_implementation=self._args.attn_implementation,
            trust_remote_code=self._trust_remote_code,
        )
        self._model.to(self._device).eval()
        eos = self._model.generation_config.eos_token_id
        self._eos = {*(eos if isinstance(eos, list) else [eos]), self._tokenizer.eos_token_id} - {None}
        # generate fills in what a call leaves open from here: the model's own end-of-sequence ids and temperature.
        self._model.generation_config = GenerationConfig()

    async def sample_group(self, group: Group) -> SampleColumns:
        if self._loop is None or self._loop.done():
            raise EngineDeadError(f"{self._name}: the torch engine is not running.")
        job = _Job(group, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._arrived.set()
        # Cancelling this call cancels the future, which the batch sees at its next token.
        return await job.done

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            try:
                columns: Sequence[SampleColumns] = await loop.run_in_executor(self._thread, self._sample, batch)
            except Exception as error:
                for job in batch:
                    if not job.done.done():
                        job.done.set_exception(EngineError(f"{self._name}: torch failed on a batch: {error}"))
                continue
            for job, result in zip(batch, columns, strict=True):
                if not job.done.done():
                    job.done.set_result(result)

    def _next_batch(self) -> list[_Job]:
        """The oldest jobs that fit side by side, at least one.

        Prompts are padded to the longest, and the batch runs for as many steps as its longest sample: together these
        must stay within the context.
        """
        self._waiting = [job for job in self._waiting if not job.done.done()]
        rows = width = steps = 0
        for taken, job in enumerate(self._waiting):
            rows += job.group.count
            width = max(width, len(job.group.prompt_ids))
            steps = max(steps, most_new_tokens(self.info, job.group))
            if taken and (rows > self._args.max_num_seqs or width + steps > self.info.max_model_len):
                break
        else:
            taken = len(self._waiting)
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return batch

    def _sample(self, batch: list[_Job]) -> list[SampleColumns]:
        """Runs in the engine's thread."""
        import torch

        with torch.inference_mode():
            rows = [[self._row(job.group, j) for j in range(job.group.count)] for job in batch]
            running = [(job, row) for job, part in zip(batch, rows, strict=True) for row in part if row.most_tokens]
            if running:
                self._generate(running)
            return [self._columns(job.group, part) for job, part in zip(batch, rows, strict=True)]

    def _row(self, group: Group, j: int) -> _Row:
        import torch

        generator = torch.Generator()
        seed = group.seed_of(j)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return _Row(group.params, most_new_tokens(self.info, group), generator)

    def _generate(self, running: list[tuple[_Job, _Row]]) -> None:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        width = max(len(job.group.prompt_ids) for job, _ in running)
        ids = torch.zeros((len(running), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (job, _) in enumerate(running):
            prompt = torch.from_numpy(job.group.prompt_ids.astype(np.int64))
            ids[i, width - len(prompt) :] = prompt
            mask[i, width - len(prompt) :] = 1
        sampler = _RowSampler([row for _, row in running], mask, self._args.logprobs_mode)
        self._model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=GenerationConfig(
                do_sample=False,  # the sampler below leaves one token to choose from
                max_new_tokens=max(row.most_tokens for _, row in running),
                pad_token_id=0,
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([_RowStopper(running, self._eos, self._tokenizer)]),
        )

    def _columns(self, group: Group, rows: list[_Row]) -> SampleColumns:
        import torch

        params = group.params
        logprobs: FloatArray | None = None
        logprob_tokens: NDArray[np.int32] | None = None
        if params.logprobs is not None:
            width = 1 + params.logprobs
            parts = [part for row in rows for part in row.logprobs]
            logprobs = torch.stack(parts).numpy() if parts else np.empty((0, width), np.float32)
            if width > 1:
                ids = [part for row in rows for part in row.logprob_tokens]
                logprob_tokens = torch.stack(ids).numpy().astype(np.int32) if ids else np.empty((0, width), np.int32)
        scores = None if params.prompt_logprobs is None else self._score(group.prompt_ids, params.prompt_logprobs)
        texts = self._tokenizer.batch_decode([row.tokens for row in rows], skip_special_tokens=False)
        return columns_of_group(
            group,
            self._name,
            [row.tokens for row in rows],
            [text if row.decoded is None else row.decoded for row, text in zip(rows, texts, strict=True)],
            [row.stop_reason or "length" for row in rows],
            logprobs,
            logprob_tokens,
            scores,
        )

    def _score(self, prompt_ids: NDArray[np.int32], k: int) -> PromptScores:
        import torch

        ids = torch.from_numpy(prompt_ids.astype(np.int64)).to(self._device)
        logprobs = torch.log_softmax(self._model(ids[None]).logits[0, :-1].float(), -1)
        own = logprobs.gather(1, ids[1:, None])
        top = logprobs.topk(k, dim=-1)
        none = torch.full((1, 1 + k), float("nan"))
        values = torch.cat([none, torch.cat([own, top.values], 1).cpu()]).numpy()
        tokens = torch.cat([torch.full((1, k), -1), top.indices.cpu()]).numpy().astype(np.int32)
        return PromptScores(logprobs=values[:, 0], top_tokens=tokens, top_logprobs=values[:, 1:])

    async def check_health(self) -> None:
        if self._loop is None or self._loop.done():
            raise EngineDeadError(f"{self._name}: the torch engine is not running.")

    async def stop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
        for job in [*self._batch, *self._waiting]:
            if not job.done.done():
                job.done.set_exception(EngineDeadError(f"{self._name}: the torch engine was stopped."))
        self._thread.shutdown(wait=False, cancel_futures=True)


class _RowSampler:
    """A logits processor that samples each row by its own parameters and its own random stream.

    It hands generate logits with one finite entry a row. Order of the steps as in vLLM: repetition penalty,
    temperature, top-k, top-p.
    """

    def __init__(self, rows: list[_Row], prompt_mask: Any, logprobs_mode: LogprobsMode) -> None:
        self._rows = rows
        self._prompt_mask = prompt_mask
        self._logprobs_mode = logprobs_mode

    def __call__(self, input_ids: Any, logits: Any) -> Any:
        import torch

        logits = logits.float().cpu()
        ids = input_ids.cpu()
        forced = torch.full_like(logits, float("-inf"))
        for i, row in enumerate(self._rows):
            if row.stop_reason is not None:
                forced[i, 0] = 0.0
                continue
            token = self._sample(row, ids[i], logits[i], self._prompt_mask[i])
            forced[i, token] = 0.0
        return forced.to(input_ids.device)

    def _sample(self, row: _Row, ids: Any, logits: Any, prompt_mask: Any) -> int:
        import torch

        params = row.params
        raw = logits
        if params.repetition_penalty != 1.0:
            width = len(prompt_mask)
            seen = torch.cat([ids[:width][prompt_mask.bool()], ids[width:]]).unique()
            values = logits[seen]
            penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            logits = logits.index_copy(0, seen, penalised)
        if not params.greedy:
            logits = _truncated(logits / params.temperature, params.top_k, params.top_p)
        if params.greedy:
            token = int(logits.argmax())
        else:
            # The exponential race: argmax of p / Exp(1) is a draw from p.
            noise = torch.empty_like(logits).exponential_(generator=row.generator)
            token = int((logits.softmax(-1) / noise).argmax())
        row.tokens.append(token)
        if params.logprobs is not None:
            source = raw if self._logprobs_mode == "raw_logprobs" else logits
            logprobs = source.log_softmax(-1)
            top = logprobs.topk(params.logprobs)
            row.logprobs.append(torch.cat([logprobs[token : token + 1], top.values]))
            row.logprob_tokens.append(torch.cat([torch.tensor([token]), top.indices]))
        return token


def _truncated(logits: Any, top_k: int, top_p: float) -> Any:
    """Logits outside the k likeliest, and outside the smallest set that reaches top_p, at −inf. Shape [V]."""
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.index_fill(0, order[before >= top_p], float("-inf"))
    return logits


class _RowStopper:
    """A stopping criterion that says for each row whether it is done, and records why."""

    def __init__(self, running: list[tuple[_Job, _Row]], eos: set[int], tokenizer: Any) -> None:
        self._running = running
        self._eos = eos
        self._tokenizer = tokenizer

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        for job, row in self._running:
            if row.stop_reason is None:
                row.stop_reason = "abort" if job.done.done() else self._reason(row)
        done = [row.stop_reason is not None for _, row in self._running]
        return torch.tensor(done, device=input_ids.device)

    def _reason(self, row: _Row) -> StopReason | None:
        params = row.params
        last = row.tokens[-1]
        if last in params.stop_token_ids or (last in self._eos and not params.ignore_eos):
            return "stop"
        if params.stop_strings:
            text = self._tokenizer.decode(row.tokens, skip_special_tokens=False)
            if (end := stop_cut(text, params.stop_strings)) is not None:
                row.decoded = text[:end]
                return "stop"
        return "length" if len(row.tokens) >= row.most_tokens else None
