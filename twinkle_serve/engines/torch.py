"""The torch engine: batched transformers generate, for debugging and as a reference for vllm."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt

from twinkle_serve.adapters import describe_adapter, not_in_model
from twinkle_serve.checkpoint import Bucket
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.data_format.samples import (
    STOP_REASONS,
    FloatArray,
    PartialSample,
    PromptScores,
    SampleColumns,
    StopReason,
)
from twinkle_serve.data_format.weights import INITIAL_LABEL, PauseMode
from twinkle_serve.engines.base import TokenDelta, columns_of_group, most_new_tokens, parse_engine_args
from twinkle_serve.engines.torch_rows import LogprobsMode, Row, RowSampler, RowStopper
from twinkle_serve.errors import (
    AdapterError,
    EngineArgsError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    UnsupportedError,
    WeightsError,
)


class TorchArgs(BaseModel):
    """`engine_args` of the torch engine, named as vLLM's and with their meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: PositiveInt | None = None
    """None: the model's own limit."""
    max_num_seqs: PositiveInt = 64
    """Largest number of rows in a batch."""
    max_logprobs: PositiveInt = 20
    logprobs_mode: LogprobsMode = "raw_logprobs"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    enable_lora: bool = True
    """Costs nothing until an adapter is loaded."""
    max_lora_rank: PositiveInt = 512


def check_engine_args(engine_args: Mapping[str, Any]) -> TorchArgs:
    """Parses the arguments; see `parse_engine_args`."""
    return parse_engine_args(TorchArgs, "torch", engine_args)


@dataclass(slots=True, eq=False)
class _Job:
    group: Group
    done: asyncio.Future[SampleColumns]
    stream: asyncio.Queue[TokenDelta] | None = None
    """Receives the tokens of a streamed sample."""


class TorchEngine:
    """Runs groups on one transformers model and one device. See `Engine` for the guarantees.

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
        self._peft: Any = None
        """peft's wrapper, created with the first adapter; it changes the model in place."""
        self._active: str | None = None
        """peft's name of the running batch's adapter; None for the base model."""
        self._between_tokens: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """Changes to the model, made by its thread between two tokens."""
        self._label = INITIAL_LABEL
        """Label of the loaded weights."""
        self._computed_is_stale = False
        """Whether the model's weights have changed under the running batch."""
        self._held = False
        """Whether the model's thread is paused between two tokens."""
        self._steps = 0
        """Number of steps that the model's thread has run."""
        self._aborting = False
        """Whether running samples must end with the tokens that they have."""
        self._may_begin = asyncio.Event()
        """Set while new batches may start."""
        self._may_begin.set()
        self._idle = asyncio.Event()
        """Set while no batch runs."""
        self._idle.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except (OSError, ValueError) as error:
            raise EngineStartError(f"{self._name}: transformers could not load {self._path!r}: {error}") from error
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if longest is None:
            raise EngineStartError(f"{self._name}: the config of {self._path!r} has no max_position_embeddings.")
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
            max_lora_rank=self._args.max_lora_rank if self._args.enable_lora else 0,
        )
        self._events = asyncio.get_running_loop()
        self._loop = asyncio.create_task(self._run())

    def _load(self) -> None:
        import os

        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        if self._device == "cpu" and self._cpus:
            # Threads started from here on, including torch's pool, inherit this thread's affinity.
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
        # generate takes its defaults from here, such as the model's end-of-sequence ids and temperature.
        self._model.generation_config = GenerationConfig()

    async def sample_group(self, group: Group) -> SampleColumns:
        # Cancelling this call cancels the future, which the batch sees at its next token.
        return await self._submit(group).done

    def _submit(self, group: Group, stream: asyncio.Queue[TokenDelta] | None = None) -> _Job:
        if self._loop is None or self._loop.done():
            raise EngineDeadError(f"{self._name}: the torch engine is not running.")
        job = _Job(group, asyncio.get_running_loop().create_future(), stream)
        self._waiting.append(job)
        self._arrived.set()
        return job

    async def stream_tokens(self, group: Group) -> AsyncGenerator[TokenDelta, None]:
        arrived: asyncio.Queue[TokenDelta] = asyncio.Queue()
        job = self._submit(group, arrived)
        delta: asyncio.Future[TokenDelta] = asyncio.get_running_loop().create_future()
        try:
            while True:
                delta = asyncio.ensure_future(arrived.get())
                waited: set[asyncio.Future[Any]] = {delta, job.done}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if not delta.done():
                    delta.cancel()
                    # Ended without a token, or failed.
                    columns = await job.done
                    yield TokenDelta(tokens=[], stop_reason=STOP_REASONS[int(columns.stop_reason[0])])
                    return
                yield delta.result()
                if delta.result().stop_reason is not None:
                    return
        finally:
            delta.cancel()
            job.done.cancel()

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await self._may_begin.wait()
            batch = self._batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            self._idle.clear()
            try:
                columns: Sequence[SampleColumns] = await loop.run_in_executor(self._thread, self._sample, batch)
            except Exception as error:
                for job in batch:
                    if not job.done.done():
                        job.done.set_exception(EngineError(f"{self._name}: torch failed on a batch: {error}"))
                continue
            finally:
                self._idle.set()
            for job, result in zip(batch, columns, strict=True):
                if not job.done.done():
                    job.done.set_result(result)

    def _next_batch(self) -> list[_Job]:
        """Takes the oldest jobs that use the oldest one's adapter and fit in one batch, at least one.

        Prompts are padded to the longest one, and the batch runs for as many steps as its longest sample: the sum of
        the two must stay within the context.
        """
        self._waiting = [job for job in self._waiting if not job.done.done()]
        batch: list[_Job] = []
        rows = width = steps = 0
        for job in self._waiting:
            if job.group.adapter != self._waiting[0].group.adapter:
                continue
            rows += job.group.count
            width = max(width, len(job.group.prompt_ids))
            steps = max(steps, most_new_tokens(self.info, job.group))
            if batch and (rows > self._args.max_num_seqs or width + steps > self.info.max_model_len):
                break
            batch.append(job)
        taken = set(map(id, batch))
        self._waiting = [job for job in self._waiting if id(job) not in taken]
        return batch

    def _sample(self, batch: list[_Job]) -> list[SampleColumns]:
        """Samples a batch, in the engine's thread."""
        import torch

        adapter = batch[0].group.adapter
        with torch.inference_mode():
            self._activate(None if adapter is None else _peft_name(adapter))
            rows = [[self._row(job, j) for j in range(job.group.count)] for job in batch]
            scores = [self._score(job.group) for job in batch]
            running = [(job, row) for job, part in zip(batch, rows, strict=True) for row in part if row.most_tokens]
            while running:
                self._computed_is_stale = False
                self._generate(running)
                # The weights changed under the remaining rows: they continue from the tokens that they have.
                running = [(job, row) for job, row in running if row.stop_reason is None]
            return [self._columns(*of_job) for of_job in zip([job.group for job in batch], rows, scores, strict=True)]

    def _row(self, job: _Job, j: int) -> Row:
        import torch

        generator = torch.Generator()
        seed = job.group.seed_of(j)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)

        def tell(token: int, reason: StopReason | None, by_stop_string: bool) -> None:
            assert job.stream is not None
            delta = TokenDelta(tokens=[token], stop_reason=reason, by_stop_string=by_stop_string)
            self._events.call_soon_threadsafe(job.stream.put_nowait, delta)

        limit_s = job.group.sample_timeout_s
        end = math.inf if limit_s is None else time.monotonic() + limit_s
        return Row(
            params=job.group.params,
            most_tokens=most_new_tokens(self.info, job.group),
            generator=generator,
            aborted=lambda: self._aborting or job.done.done() or time.monotonic() >= end,
            on_token=None if job.stream is None else tell,
            weight_versions=[(self._label, 0)],
        )

    def _generate(self, running: list[tuple[_Job, Row]]) -> None:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        width = max(len(job.group.prompt_ids) + len(row.tokens) for job, row in running)
        ids = torch.zeros((len(running), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (job, row) in enumerate(running):
            so_far = torch.tensor([*job.group.prompt_ids.tolist(), *row.tokens])
            ids[i, width - len(so_far) :] = so_far
            mask[i, width - len(so_far) :] = 1
            row.sampled_by(self._label)
        rows = [row for _, row in running]
        sampler = RowSampler(rows, mask, self._args.logprobs_mode)
        self._model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=GenerationConfig(
                do_sample=False,  # the sampler below leaves one token to choose
                max_new_tokens=max(row.most_tokens - len(row.tokens) for row in rows),
                pad_token_id=0,
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList(
                [RowStopper(rows, self._eos, self._tokenizer, self._run_between_tokens)]
            ),
        )

    def _columns(self, group: Group, rows: list[Row], scores: PromptScores | None) -> SampleColumns:
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
            [tuple(row.weight_versions) for row in rows],
        )

    def _score(self, group: Group) -> PromptScores | None:
        import torch

        prompt_ids, k = group.prompt_ids, group.params.prompt_logprobs
        if k is None:
            return None
        self._steps += 1
        ids = torch.from_numpy(prompt_ids.astype(np.int64)).to(self._device)
        logprobs = torch.log_softmax(self._model(ids[None]).logits[0, :-1].float(), -1)
        own = logprobs.gather(1, ids[1:, None])
        top = logprobs.topk(k, dim=-1)
        none = torch.full((1, 1 + k), float("nan"))
        values = torch.cat([none, torch.cat([own, top.values], 1).cpu()]).numpy()
        tokens = torch.cat([torch.full((1, k), -1), top.indices.cpu()]).numpy().astype(np.int32)
        return PromptScores(logprobs=values[:, 0], top_tokens=tokens, top_logprobs=values[:, 1:])

    # -- adapters --------------------------------------------------------------------------------

    async def load_adapter(self, version: AdapterVersion, files: AdapterFiles) -> None:
        await self._to_model(lambda: self._load_adapter(version, files))

    async def drop_adapter(self, version: AdapterVersion) -> None:
        await self._to_model(lambda: self._drop_adapter(_peft_name(version)))

    def _drop_adapter(self, name: str) -> None:
        if self._active == name:
            self._activate(None)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # another adapter becomes active
            self._peft.delete_adapter(name)

    async def _to_model(self, change: Callable[[], None]) -> None:
        """Makes a change in the model's thread: between two tokens of a running batch, or at once if none runs."""
        done = asyncio.get_running_loop().create_future()

        def settle(error: Exception | None) -> None:
            if not done.done():
                done.set_exception(error) if error else done.set_result(None)

        def run() -> None:
            import torch

            error: Exception | None = None
            try:
                with torch.inference_mode(False):  # tensors created in inference mode cannot be changed outside it
                    change()
            except Exception as failure:
                error = failure
            self._events.call_soon_threadsafe(settle, error)

        self._between_tokens.put(run)
        self._thread.submit(self._run_between_tokens)
        await done

    def _run_between_tokens(self) -> bool:
        """Makes pending changes, and waits while paused. Returns whether the running batch must be recomputed."""
        self._steps += 1
        while self._held or not self._between_tokens.empty():
            self._between_tokens.get()()
        return self._computed_is_stale

    def _load_adapter(self, version: AdapterVersion, files: AdapterFiles) -> None:
        import safetensors.torch
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        adapter = describe_adapter(files)
        # Modules as named by the tensors: the config's target_modules may match more or fewer.
        names = {name.replace(".base_layer", "") for name, _ in self._model.named_modules()}
        if left_out := adapter.modules - names:
            raise not_in_model(left_out)
        known = {key: adapter.config[key] for key in PEFT_KEYS if adapter.config.get(key) is not None}
        config = LoraConfig(target_modules=sorted(adapter.modules), inference_mode=True, **known)
        name = _peft_name(version)
        loaded = False
        try:
            if self._peft is None:
                self._peft = get_peft_model(self._model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
            result = set_peft_model_state_dict(self._peft, safetensors.torch.load(files.weights), adapter_name=name)
            if result.unexpected_keys:
                raise not_in_model(set(result.unexpected_keys))
            loaded = True
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise AdapterError(f"peft refuses adapter {version.name!r}: {error}") from error
        finally:
            if not loaded and self._peft is not None and name in self._peft.peft_config:
                self._peft.delete_adapter(name)
            self._activate(self._active)  # peft activates a new adapter

    def _activate(self, name: str | None) -> None:
        """Switches the model to an adapter, or to the base model."""
        self._active = name
        if self._peft is None:
            return
        if name is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(name, inference_mode=True)

    # -- weights ---------------------------------------------------------------------------------

    async def pause(self, mode: PauseMode) -> None:
        self._may_begin.clear()
        if mode == "keep":
            await self._to_model(functools.partial(setattr, self, "_held", True))
            return
        await self._release()
        self._aborting = mode == "abort"
        try:
            await self._idle.wait()
        finally:
            self._aborting = False

    async def resume(self) -> None:
        await self._release()
        self._may_begin.set()

    async def _release(self) -> None:
        # Even if not held: an abandoned pause may be about to hold it.
        await self._to_model(functools.partial(setattr, self, "_held", False))

    async def load_weights(self, label: str, buckets: AsyncIterable[Bucket]) -> str:
        import safetensors.torch

        renamed: dict[str, Any] = {}
        async for bucket in buckets:
            tensors = safetensors.torch.load(bucket.tobytes())
            await self._to_model(functools.partial(self._load_weights, tensors, renamed))
        checksum: list[str] = []

        def finish() -> None:
            self._load_renamed(renamed)
            self._label, self._computed_is_stale = label, True
            checksum.append(self._checksum())

        await self._to_model(finish)
        return checksum[0]

    def _own_weights(self) -> dict[str, Any]:
        """Returns the model's parameters without those of adapters, under their names without adapters."""
        parameters = self._model.named_parameters()
        return {name.replace(".base_layer.", "."): value for name, value in parameters if ".lora_" not in name}

    def _load_weights(self, tensors: dict[str, Any], renamed: dict[str, Any]) -> None:
        """Copies weights into the model; those that it knows by other names than the checkpoint go to `renamed`."""
        own = self._own_weights()
        for name, tensor in tensors.items():
            if name not in own:
                renamed[name] = tensor
            elif own[name].shape != tensor.shape:
                raise WeightsError(
                    f"weight {name!r} has the shape {tuple(tensor.shape)}, the model's has {own[name].shape}."
                )
            else:
                own[name].data.copy_(tensor)

    def _load_renamed(self, renamed: dict[str, Any]) -> None:
        """Lets transformers convert checkpoint weights to its own, such as the stacked experts of a MoE model."""
        if not renamed or (set(renamed) <= {"lm_head.weight"} and self._model.config.tie_word_embeddings):
            return
        fresh, info = type(self._model).from_pretrained(
            None, config=self._model.config, state_dict=renamed, dtype=self._model.dtype, output_loading_info=True
        )
        if info["unexpected_keys"] or info["mismatched_keys"]:
            raise WeightsError(f"transformers cannot load the weights {sorted(info['unexpected_keys'])[:3]}.")
        own, missing = self._own_weights(), set(info["missing_keys"])
        for name, value in fresh.named_parameters():
            if name not in missing:
                own[name].data.copy_(value)

    def _checksum(self) -> str:
        import torch

        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self._own_weights().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    async def reset_prefix_cache(self) -> None:
        """Does nothing: there is no cache, every batch recomputes its prompts."""

    async def sleep(self, level: int) -> None:
        raise UnsupportedError("the torch engine does not sleep. Use engine: vllm on a GPU.")

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        raise UnsupportedError("the torch engine does not sleep. Use engine: vllm on a GPU.")

    def partial_output(self, group: Group, offset: int) -> PartialSample | None:
        return None  # a batch runs to its end in the model's own thread

    def progress(self) -> int:
        return self._steps

    async def check_health(self) -> None:
        if self._loop is None or self._loop.done():
            raise EngineDeadError(f"{self._name}: the torch engine is not running.")

    async def stop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
        self._held = False
        self._between_tokens.put(lambda: None)  # wakes a held thread
        for job in [*self._batch, *self._waiting]:
            if not job.done.done():
                job.done.set_exception(EngineDeadError(f"{self._name}: the torch engine was stopped."))
        self._thread.shutdown(wait=False, cancel_futures=True)


PEFT_KEYS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
"""Keys of a LoraConfig that affect the adapter's output."""


def _peft_name(version: AdapterVersion) -> str:
    return f"v{version.id}"
