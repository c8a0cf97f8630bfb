"""One transformers model as an engine."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group
from twinkle_serve.data_format.samples import STOP_REASONS, PartialSample, PromptScores, SampleColumns, StopReason
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.data_format.telemetry import EngineLoad
from twinkle_serve.data_format.weights import INITIAL_LABEL, Bucket, PauseMode
from twinkle_serve.engines.drawing import columns_of_samples
from twinkle_serve.engines.logits import LogitsProcessor
from twinkle_serve.engines.protocol import StagedBucket, TokenDelta, WeightsReceiver, max_new_tokens
from twinkle_serve.engines.stages import OnStage, ignore_stage
from twinkle_serve.engines.torch.adapters import ModelAdapters
from twinkle_serve.engines.torch.args import check_engine_args
from twinkle_serve.engines.torch.model import TorchModel
from twinkle_serve.engines.torch.rows import Row
from twinkle_serve.engines.torch.weights import copy_renamed, copy_weights, weights_checksum
from twinkle_serve.errors import (
    EngineArgsError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    SamplingParamsError,
    UnsupportedError,
)
from twinkle_serve.tensors import stored_dtype

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class _Job:
    group: Group
    done: asyncio.Future[SampleColumns]
    stream: asyncio.Queue[TokenDelta] | None = None
    """Receives the tokens of a streamed sample."""
    rows: Sequence[Row] = ()
    """Its samples, once its batch runs."""


class TorchEngine:
    """Runs groups on one transformers model and one device. See `Engine` for the guarantees.

    A batch runs to its end before the next one starts.
    """

    info: EngineInfo
    receiver: WeightsReceiver | None = None

    def __init__(
        self,
        name: str,
        model: str,
        engine_args: Mapping[str, object],
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
        self._model = TorchModel(model, self._args, device=device, cpus=self._cpus, trust_remote_code=trust_remote_code)
        self._waiting: list[_Job] = []
        self._batch: list[_Job] = []
        self._arrived = asyncio.Event()
        self._followed: dict[Attempt, _Job] = {}
        """Unfinished jobs whose groups are followed."""
        self._changes: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """Changes to the model, made by its thread between two tokens."""
        self._label = INITIAL_LABEL
        """Label of the loaded weights."""
        self._batch_is_stale = False
        """Whether the model's weights have changed under the running batch."""
        self._held = False
        """Whether the model's thread is paused between two tokens."""
        self._steps = 0
        self._computed_tokens = 0
        """Number of steps that the model's thread has run."""
        self._aborting = False
        """Whether running samples must end with the tokens that they have."""
        self._may_start = asyncio.Event()
        """Set while new batches may start."""
        self._may_start.set()
        self._idle = asyncio.Event()
        """Set while no batch runs."""
        self._idle.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._task: asyncio.Task[None] | None = None

    async def start(self, on_stage: OnStage = ignore_stage) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._model.load, on_stage)
        except (OSError, ValueError) as error:
            raise EngineStartError(f"{self._name}: transformers could not load {self._path!r}: {error}") from error
        self._adapters = ModelAdapters(self._model.causal_lm)
        max_positions = self._model.max_positions
        if max_positions is None:
            raise EngineStartError(f"{self._name}: the config of {self._path!r} has no max_position_embeddings.")
        if self._args.max_model_len is not None and self._args.max_model_len > max_positions:
            raise EngineArgsError(
                f"engine_args.max_model_len={self._args.max_model_len}, the model has {max_positions} positions. "
                "Lower it."
            )
        self.info = EngineInfo(
            name=self._name,
            kind="torch",
            max_model_len=self._args.max_model_len or max_positions,
            scores_full_context=True,
            vocab_size=self._model.vocab_size,
            max_num_seqs=self._args.max_num_seqs,
            max_logprobs=self._args.max_logprobs,
            logprobs_mode=self._args.logprobs_mode,
            device=self._device,
            cpus=self._cpus,
            max_lora_rank=self._args.max_lora_rank if self._args.enable_lora else 0,
            dtype=stored_dtype(self._model.causal_lm.dtype),
            adapter_dtype="F32",  # peft's, whatever the model's
            eos_token_ids=tuple(sorted(self._model.eos)),
            lacks=self._lacks(),
        )
        self._event_loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run())

    def _lacks(self) -> dict[str, str]:
        """See `EngineInfo.lacks`."""
        lacks = {"structured_outputs": "the torch engine has no grammars. Use engine: vllm."}
        if self._model.thinking is None:
            lacks["thinking_token_budget"] = (
                "the engine does not know how the model marks its thinking. Set engine_args.reasoning_config to "
                "{reasoning_start_str: …, reasoning_end_str: …}."
            )
        return lacks

    async def check_structured(self, structured: StructuredOutputs) -> None:
        raise SamplingParamsError(f"structured_outputs is not available: {self._lacks()['structured_outputs']}")

    async def sample_group(self, group: Group) -> SampleColumns:
        job = self._submit(group)
        if not group.is_readable:
            # Cancelling this call cancels the future, which the batch sees at its next token.
            return await job.done
        self._followed[group.attempt] = job
        try:
            return await job.done
        finally:
            del self._followed[group.attempt]

    def _submit(self, group: Group, stream: asyncio.Queue[TokenDelta] | None = None) -> _Job:
        if self._task is None or self._task.done():
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
                either: set[asyncio.Future[TokenDelta] | asyncio.Future[SampleColumns]] = {delta, job.done}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
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

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._model.decode(tokens, skip_special_tokens=skip_special_tokens)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await self._may_start.wait()
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
            steps = max(steps, max_new_tokens(self.info, job.group))
            if batch and (rows > self._args.max_num_seqs or width + steps > self.info.max_model_len):
                break
            batch.append(job)
        taken = set(map(id, batch))
        self._waiting = [job for job in self._waiting if id(job) not in taken]
        return batch

    def _sample(self, batch: list[_Job]) -> list[SampleColumns]:
        """Samples a batch, in the engine's thread."""
        import torch

        with torch.inference_mode():
            self._adapters.activate(batch[0].group.adapter)
            rows = [[self._row(job, j) for j in range(job.group.count)] for job in batch]
            for job, part in zip(batch, rows, strict=True):
                job.rows = part
                self._computed_tokens += len(job.group.prompt_ids)
            scores = [self._score(job.group) for job in batch]
            running = [(job, row) for job, part in zip(batch, rows, strict=True) for row in part if row.max_tokens]
            while running:
                self._batch_is_stale = False
                self._generate(running)
                # The weights changed under the remaining rows: they continue from the tokens that they have.
                running = [(job, row) for job, row in running if row.stop_reason is None]
            return [
                columns_of_samples(job.group, self._name, part, score, self._model.decode)
                for job, part, score in zip(batch, rows, scores, strict=True)
            ]

    def _row(self, job: _Job, j: int) -> Row:
        import torch

        generator = torch.Generator()
        seed = job.group.seed_of(j)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)

        def report_token(token: int, reason: StopReason | None, by_stop_string: bool) -> None:
            assert job.stream is not None
            delta = TokenDelta(tokens=[token], stop_reason=reason, by_stop_string=by_stop_string)
            self._event_loop.call_soon_threadsafe(job.stream.put_nowait, delta)

        limit_s = job.group.sample_timeout_s
        end = math.inf if limit_s is None else time.monotonic() + limit_s
        params = job.group.params
        return Row(
            params=params,
            process=LogitsProcessor(
                params, job.group.prompt_ids, self._model.eos, self._model.encode, self._model.thinking
            ),
            logprobs_mode=params.logprobs_mode or self._args.logprobs_mode,
            eos=self._model.eos,
            decode=self._model.decode,
            max_tokens=max_new_tokens(self.info, job.group),
            generator=generator,
            aborted=lambda: self._aborting or job.done.done() or time.monotonic() >= end,
            on_token=None if job.stream is None else report_token,
            weight_versions=[(self._label, 0)],
        )

    def _generate(self, running: list[tuple[_Job, Row]]) -> None:
        for _, row in running:
            row.sampled_by(self._label)
        prompts = [job.group.prompt_ids for job, _ in running]
        self._model.generate(prompts, [row for _, row in running], self._apply_changes)

    def _score(self, group: Group) -> PromptScores | None:
        if group.params.prompt_logprobs is None:
            return None
        self._steps += 1
        return self._model.score(group.prompt_ids, group.params.prompt_logprobs)

    async def load_adapter(self, version: AdapterVersion, files: AdapterFiles) -> None:
        await self._change_model(lambda: self._adapters.load(version, files))

    async def drop_adapter(self, version: AdapterVersion) -> None:
        await self._change_model(lambda: self._adapters.drop(version))

    async def _change_model(self, change: Callable[[], None]) -> None:
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
            self._event_loop.call_soon_threadsafe(settle, error)

        self._changes.put(run)
        self._thread.submit(self._apply_changes)
        await done

    def _apply_changes(self) -> bool:
        """Makes pending changes, and waits while paused. Returns whether the running batch must be recomputed."""
        self._steps += 1
        while self._held or not self._changes.empty():
            self._changes.get()()
        return self._batch_is_stale

    async def pause(self, mode: PauseMode) -> None:
        self._may_start.clear()
        if mode == "keep":
            await self._change_model(functools.partial(setattr, self, "_held", True))
            return
        await self._release()
        self._aborting = mode == "abort"
        try:
            await self._idle.wait()
        finally:
            self._aborting = False

    async def resume(self) -> None:
        await self._release()
        self._may_start.set()

    async def _release(self) -> None:
        # Even if not held: an abandoned pause may be about to hold it.
        await self._change_model(functools.partial(setattr, self, "_held", False))

    def stage_weights(self, buckets: AsyncGenerator[Bucket, None]) -> AsyncGenerator[StagedBucket, None]:
        return buckets

    async def load_weights(self, label: str, buckets: AsyncIterable[StagedBucket]) -> str:
        import safetensors.torch

        renamed: dict[str, Tensor] = {}
        async for bucket in buckets:
            assert not isinstance(bucket, Path)
            tensors = safetensors.torch.load(bucket.tobytes())
            await self._change_model(functools.partial(copy_weights, self._model.causal_lm, tensors, renamed))
        checksum: list[str] = []

        def finish() -> None:
            copy_renamed(self._model.causal_lm, renamed)
            self._label, self._batch_is_stale = label, True
            checksum.append(weights_checksum(self._model.causal_lm))

        await self._change_model(finish)
        return checksum[0]

    async def reset_prefix_cache(self) -> None:
        """Does nothing: there is no cache, every batch recomputes its prompts."""

    async def sleep(self, level: int) -> None:
        raise UnsupportedError("the torch engine does not sleep. Use engine: vllm on a GPU.")

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        raise UnsupportedError("the torch engine does not sleep. Use engine: vllm on a GPU.")

    def partial_output(self, group: Group, offset: int, sample: int = 0) -> PartialSample | None:
        job = self._followed.get(group.attempt)
        return None if job is None or not job.rows else job.rows[sample].partial(offset)

    def progress(self) -> int:
        return self._steps

    async def load(self) -> EngineLoad:
        running = sum(row.stop_reason is None for job in self._batch for row in job.rows)
        waiting = sum(job.group.count for job in self._waiting)
        return EngineLoad(running=running, waiting=waiting, computed_tokens=self._computed_tokens)

    async def check_health(self) -> None:
        if self._task is None or self._task.done():
            raise EngineDeadError(f"{self._name}: the torch engine is not running.")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._held = False
        self._changes.put(lambda: None)  # wakes a held thread
        for job in [*self._batch, *self._waiting]:
            if not job.done.done():
                job.done.set_exception(EngineDeadError(f"{self._name}: the torch engine was stopped."))
        self._thread.shutdown(wait=False, cancel_futures=True)
