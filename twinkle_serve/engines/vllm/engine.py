"""One AsyncLLM as an engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinkle_serve.adapter_description import not_in_model
from twinkle_serve.collection import no_collection
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group
from twinkle_serve.data_format.samples import PartialSample, SampleColumns
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.data_format.telemetry import EngineLoad
from twinkle_serve.data_format.weights import INITIAL_LABEL, Bucket, PauseMode
from twinkle_serve.engines.protocol import StagedBucket, TokenDelta, WeightsReceiver
from twinkle_serve.engines.stages import OnStage, ignore_stage
from twinkle_serve.engines.vllm.args import build_config, check_engine_args, engine_info, set_environment
from twinkle_serve.engines.vllm.grammars import GrammarChecks
from twinkle_serve.engines.vllm.load import LoadQuery, stat_loggers
from twinkle_serve.engines.vllm.lora_slots import AdapterSlots
from twinkle_serve.engines.vllm.outputs import (
    aborted_without_output,
    group_columns,
    has_tokens,
    last_output,
    partial_sample,
    running_tokens,
)
from twinkle_serve.engines.vllm.processes import allow_high_temperatures, refuse_import_of_main, use_own_entry
from twinkle_serve.engines.vllm.receiver import TransferReceiver
from twinkle_serve.engines.vllm.reports import Reports
from twinkle_serve.engines.vllm.requests import sampling_params
from twinkle_serve.engines.vllm.tmpfs import EngineFiles
from twinkle_serve.errors import (
    AdapterError,
    EngineCrashedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    SamplingParamsError,
    UnsupportedError,
    WeightsError,
)

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

FIRST_TOKEN_PERIOD_S = 0.01
"""Polling period for the first token of a sample that has timed out."""


class VLLMEngine:
    """Runs groups on one AsyncLLM. See `Engine` for the guarantees."""

    info: EngineInfo

    def __init__(
        self,
        name: str,
        model: str,
        engine_args: Mapping[str, object],
        *,
        device: str,
        tp_size: int = 1,
        pp_size: int = 1,
        executor: str = "mp",
        cpus: Sequence[Sequence[int]] = (),
        devices_on_node: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            model: directory of the model.
            executor: mp (one node) or ray (a placement group across several nodes).
            cpus: on CPU, the cores of each of the tp_size * pp_size workers.
            devices_on_node: on CPU, devices of all engines that share the node's memory.
        """
        self._name = name
        self._model = model
        self._engine_args = dict(engine_args)
        self._device = device
        self._tp_size, self._pp_size = tp_size, pp_size
        self._executor = executor
        self._cpus = [tuple(cores) for cores in cpus]
        self._devices_on_node = devices_on_node
        self._trust_remote_code = trust_remote_code
        self._llm: AsyncLLM = None
        """None before `start` and after `stop`."""
        self._request_ids = itertools.count()
        self._files: EngineFiles | None = None
        self._reports: Reports | None = None
        self._stopped = False
        self._lora_requests: dict[int, LoRARequest] = {}
        """LoRARequest of each adapter version, by version id."""
        self._label = INITIAL_LABEL
        """Label of the loaded weights."""
        self.receiver: WeightsReceiver | None = None
        self._slots: AdapterSlots | None = None
        self._followed: dict[Attempt, tuple[str, int]] = {}
        """vLLM's request id, and the index in the request, of each running sample whose group is followed."""
        self._finished_tokens = 0
        """Number of tokens of finished samples."""
        self._computed_tokens = self._cached_tokens = 0
        """Prompt tokens of finished groups."""
        self._load: LoadQuery | None = None
        self._grammars: GrammarChecks | None = None

    async def start(self, on_stage: OnStage = ignore_stage) -> None:
        check_engine_args(self._engine_args)
        refuse_import_of_main()
        self._files = EngineFiles()
        self._reports = Reports(self._files)
        set_environment(self._files, self._cpus if self._device == "cpu" else ())
        await asyncio.to_thread(self._start, on_stage)
        config = self._llm.vllm_config
        lora = config.lora_config
        await self._llm.update_weight_version(INITIAL_LABEL)
        if lora is not None:
            await self._llm.collective_rpc("take_lora_off_the_head")
            if self._device == "cpu":
                await self._llm.collective_rpc("keep_last_slot_empty")
                self._slots = AdapterSlots(lora.max_loras - 1)
        if self._device == "cpu":
            await self._llm.collective_rpc("use_own_sampler")
        self._tokenizer = self._llm.get_tokenizer()
        self._load = LoadQuery(self._llm)
        if config.weight_transfer_config is not None:
            self.receiver = TransferReceiver(self)
        self._grammars = GrammarChecks(config, self._files.owner)
        self.info = engine_info(self._name, config, self._device, self._cpus, self._tokenizer)

    def _start(self, on_stage: OnStage) -> None:
        with no_collection():
            from vllm.v1.engine.async_llm import AsyncLLM

        on_stage("loading")
        assert self._files is not None
        vllm_args, config = build_config(
            self._files.own_weights(self._model) if self._executor == "mp" else self._model,
            self._engine_args,
            device=self._device,
            tp_size=self._tp_size,
            pp_size=self._pp_size,
            executor=self._executor,
            devices_on_node=self._devices_on_node,
            trust_remote_code=self._trust_remote_code,
        )
        use_own_entry()
        allow_high_temperatures()
        try:
            self._llm = AsyncLLM.from_vllm_config(
                config,
                enable_log_requests=vllm_args.enable_log_requests,
                disable_log_stats=vllm_args.disable_log_stats,
                stat_loggers=stat_loggers(vllm_args.disable_log_stats),
            )
            if self._stopped:  # by a caller that was interrupted; a thread cannot be
                self._llm.shutdown()
        except Exception as error:
            reason = self._reported(starting=True) or error
            raise EngineStartError(f"{self._name}: vLLM did not start on {self._model!r}: {reason}") from error

    def _reported(self, *, starting: bool = False) -> str:
        """See `Reports.take`."""
        return "" if self._reports is None else self._reports.take(starting=starting)

    async def _outputs(self, group: Group, *, streaming: bool) -> AsyncGenerator[RequestOutput, None]:
        """Yields vLLM's outputs of a group: the complete one at the end, or the new tokens of each step.

        Raises:
            AdapterError, SamplingParamsError, EngineDeadError, EngineError
        """
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        # The parts and later attempts of a group share its id; vLLM's request ids must be unique.
        request_id = f"{group.id}-{next(self._request_ids)}"
        lora_request = None if group.adapter is None else self._lora_requests.get(group.adapter.id)
        if group.adapter is not None and lora_request is None:
            raise AdapterError(f"{self._name} has no adapter {group.adapter.label}.")
        keys = [group.part(sample, 1).attempt for sample in group.samples] if group.is_readable else []
        self._followed.update((key, (request_id, j)) for j, key in enumerate(keys))
        try:
            slot = contextlib.nullcontext() if self._slots is None else self._slots.holding(group.adapter)
            async with slot:
                prompt = tokens_input(group.prompt_ids.tolist())
                grammars = self._llm.vllm_config.structured_outputs_config.backend
                params = sampling_params(self.info, group, streaming=streaming, grammars=grammars)
                stream = self._llm.generate(
                    prompt, params, request_id, lora_request=lora_request, trace_headers=self._trace_headers(group)
                )
                async with contextlib.aclosing(stream), self._time_limit(request_id, group.sample_timeout_s):
                    async for output in stream:
                        yield output
        except VLLMEngineDeadError as error:
            raise self._dead_error() from error
        except (VLLMClientError, ValueError, TypeError) as error:
            raise SamplingParamsError(f"vLLM refuses the request: {error}") from error
        except Exception as error:
            reason = self._reported() or error.__cause__ or error
            raise EngineError(f"{self._name}: vLLM failed on a request: {reason}") from error
        finally:
            for key in keys:
                self._followed.pop(key, None)

    def _trace_headers(self, group: Group) -> dict[str, str] | None:
        """Returns the parent of vLLM's own span of a group; None where vLLM records none."""
        if not group.traceparent or self._llm.vllm_config.observability_config.otlp_traces_endpoint is None:
            return None
        return {"traceparent": group.traceparent}

    @contextlib.asynccontextmanager
    async def _time_limit(self, request_id: str, limit_s: float | None) -> AsyncGenerator[None, None]:
        """Aborts the request in vLLM after `limit_s`; it ends with the tokens that it has."""
        if limit_s is None:
            yield
            return
        timer = asyncio.create_task(self._abort_after(request_id, limit_s))
        try:
            yield
        finally:
            timer.cancel()

    async def _abort_after(self, request_id: str, limit_s: float) -> None:
        await asyncio.sleep(limit_s)
        # Every sample gets at least one token, and vLLM has no event for it.
        while not has_tokens(self._llm.output_processor, request_id):  # noqa: ASYNC110
            await asyncio.sleep(FIRST_TOKEN_PERIOD_S)
        with contextlib.suppress(Exception):  # the engine may have died
            await self._llm.abort(request_id)

    def _dead_error(self) -> EngineDeadError:
        """Returns the error for a dead engine process, which crashed or was killed from outside."""
        manager = self._llm.engine_core.resources.engine_manager
        codes = [process.exitcode for process in getattr(manager, "processes", [])]
        # None: the process has reported its failure and is still exiting.
        by_itself = any(code not in (0, -signal.SIGKILL, -signal.SIGTERM) for code in codes)
        kind = EngineCrashedError if by_itself else EngineDeadError
        known = ", ".join(str(code) for code in codes if code is not None)
        how = f", exit code {known}" if by_itself and known else ""
        cause = self._reports.cause_of_death() if by_itself and self._reports is not None else ""
        return kind(f"{self._name}: vLLM's engine process died{how}{f', after {cause}' if cause else ''}.")

    def progress(self) -> int:
        return self._finished_tokens + running_tokens(self._llm.output_processor)

    async def load(self) -> EngineLoad:
        assert self._load is not None, "started"
        return replace(
            await self._load.load(), computed_tokens=self._computed_tokens, cached_tokens=self._cached_tokens
        )

    def partial_output(self, group: Group, offset: int, sample: int = 0) -> PartialSample | None:
        request = self._followed.get((group.id, group.first_sample + sample, group.attempts))
        if request is None:
            return None
        return partial_sample(self._llm.output_processor, *request, group.params.logprobs_width, offset, self._label)

    async def sample_group(self, group: Group) -> SampleColumns:
        output = await last_output(self._outputs(group, streaming=False))
        while aborted_without_output(output, group):  # by a pause
            output = await last_output(self._outputs(group, streaming=False))
        samples = await asyncio.gather(
            *(self._resample_aborted(group, j, sample) for j, sample in enumerate(output.outputs))
        )
        if group.params.greedy:  # vLLM refuses n > 1 when greedy; all n samples are the same
            samples = samples * group.count
        columns = group_columns(group, self._name, self._label, output, samples, self.decode)
        self._finished_tokens += sum(len(sample.token_ids) for sample in samples)
        cached = output.num_cached_tokens or 0
        self._cached_tokens += cached
        self._computed_tokens += len(group.prompt_ids) - cached
        return columns

    async def _resample_aborted(self, group: Group, j: int, sample: CompletionOutput) -> CompletionOutput:
        """Returns the j-th sample of a group, resampled if a pause aborted it before its first token."""
        while sample.finish_reason == "abort" and not sample.token_ids:
            alone = replace(group, first_sample=group.first_sample + j, count=1, seed=group.seed_of(j))
            sample = (await last_output(self._outputs(alone, streaming=False))).outputs[0]
        return sample

    async def stream_tokens(self, group: Group) -> AsyncGenerator[TokenDelta, None]:
        started = over = False
        while not over:  # a pause may abort it before its first token
            async with contextlib.aclosing(self._outputs(group, streaming=True)) as outputs:
                async for output in outputs:
                    sample = output.outputs[0]
                    if sample.finish_reason == "abort" and not started and not sample.token_ids:
                        continue
                    over = sample.finish_reason is not None
                    if sample.finish_reason not in (None, "stop", "length", "abort"):
                        raise EngineError(f"{self._name}: vLLM ended a sample with {sample.finish_reason!r}.")
                    if group.params.max_tokens != 0:
                        started = True
                        yield TokenDelta(
                            tokens=list(sample.token_ids),
                            stop_reason=sample.finish_reason,
                            by_stop_string=isinstance(sample.stop_reason, str),
                        )
                    elif over:  # without the one token that vLLM samples anyway
                        yield TokenDelta(tokens=[], stop_reason="length")

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    async def check_structured(self, structured: StructuredOutputs) -> None:
        assert self._grammars is not None
        await self._grammars.check(structured.kind, structured.spec)

    async def load_adapter(self, version: AdapterVersion, files: AdapterFiles) -> None:
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        assert self._files is not None
        try:
            path = await asyncio.to_thread(self._files.put, version, files)
            # The prefix cache and the worker tell adapters apart by name, path and id, so each version gets its own.
            request = LoRARequest(f"{version.label}#{version.id}", version.id, str(path))
            # One call, since between two another adapter could evict this one from the worker's memory.
            missing_by_worker = await self._llm.collective_rpc(
                "add_adapter", args=(request.lora_name, request.lora_int_id, request.lora_path)
            )
            if missing := set.intersection(*map(set, missing_by_worker)):
                await self._llm.remove_lora(version.id)
                raise not_in_model(missing)
        except BaseException as error:
            self._files.drop(version)
            if isinstance(error, VLLMEngineDeadError):
                raise self._dead_error() from error
            if isinstance(error, OSError):
                size_bytes = len(files.config) + len(files.weights)
                raise AdapterError(
                    f"adapter {version.name!r} of {size_bytes} bytes cannot be written to {self._files.root}: {error}. "
                    "Free space there; with docker, raise --shm-size."
                ) from error
            if isinstance(error, Exception) and not isinstance(error, AdapterError):
                raise AdapterError(f"vLLM refuses adapter {version.name!r}: {self._reported() or error}") from error
            raise
        self._lora_requests[version.id] = request

    async def drop_adapter(self, version: AdapterVersion) -> None:
        assert self._files is not None
        if self._lora_requests.pop(version.id, None) is not None:
            await self._llm.remove_lora(version.id)
            self._files.drop(version)

    async def pause(self, mode: PauseMode) -> None:
        with self._translated_errors():
            # The caches stay valid until the weights change.
            await self._llm.pause_generation(mode=mode, clear_cache=False)

    async def resume(self) -> None:
        with self._translated_errors():
            await self._llm.resume_generation()

    async def stage_weights(self, buckets: AsyncGenerator[Bucket, None]) -> AsyncGenerator[StagedBucket, None]:
        assert self._files is not None
        self._files.drop_buckets()
        async with contextlib.aclosing(buckets):
            async for bucket in buckets:
                try:
                    path = await asyncio.to_thread(self._files.bucket_file, bucket)
                except OSError as error:
                    raise EngineError(
                        f"{self._name}: weights cannot be written to {self._files.root}: {error}. Free space there; "
                        "with docker, raise --shm-size."
                    ) from error
                yield path

    async def load_weights(self, label: str, buckets: AsyncIterable[StagedBucket]) -> str:
        assert self._files is not None
        try:
            started = False
            async for path in buckets:
                assert isinstance(path, Path)
                if not started:  # the old weights stay complete until the first bucket
                    await self.call_workers("begin_weights", label=label)
                    started = True
                await self.call_workers("load_weights", str(path), label=label)
                self._files.drop_bucket(path)
            checksums = await self.call_workers("finish_weights", label=label)
        finally:
            self._files.drop_buckets()
        await self.use_new_weights(label)
        return " ".join(checksums)

    async def call_workers(self, method: str, *arguments: Any, label: str = "") -> list[Any]:
        """Makes a call about new weights to the workers of a paused engine. Returns their answers.

        Args:
            label: of the weights, for errors.

        Raises:
            WeightsError: vLLM refuses them.
            EngineDeadError: the engine is gone.
        """
        try:
            answers: list[Any] = await self._llm.collective_rpc(method, args=arguments)
        except Exception as error:
            if self._llm.errored:
                raise self._dead_error() from error
            which = f" {label!r}" if label else ""
            raise WeightsError(f"vLLM refuses weights{which}: {self._reported() or error}") from error
        return answers

    async def use_new_weights(self, label: str) -> None:
        """Stamps samples with a label from now on, and has running ones recompute keys and values of old weights."""
        with self._translated_errors():
            await self._llm.reset_prefix_cache(reset_running_requests=True)
            await self._llm.update_weight_version(label)
        self._label = label

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Translates vLLM's error for a dead engine to ours."""
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        try:
            yield
        except VLLMEngineDeadError as error:
            raise self._dead_error() from error

    async def reset_prefix_cache(self) -> None:
        if not await self._llm.reset_prefix_cache():
            raise EngineError(f"{self._name}: vLLM did not reset its prefix cache: its blocks are in use. Try again.")

    async def sleep(self, level: int) -> None:
        if self._device == "cpu":
            raise UnsupportedError(f"{self._name} runs on cpu, where sleep frees nothing. Remove the call.")
        if not self._llm.vllm_config.model_config.enable_sleep_mode:
            raise UnsupportedError("sleep needs engine_args.enable_sleep_mode: true. Start the service with it.")
        await self._llm.sleep(level)

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        if self._device == "cpu":
            raise UnsupportedError(f"{self._name} runs on cpu and never sleeps. Remove the call of wake_up.")
        await self._llm.wake_up(None if tags is None else list(tags))

    async def check_health(self) -> None:
        if self._llm is None or self._llm.errored:
            raise self._dead_error() if self._llm else EngineDeadError(f"{self._name} is stopped.")

    async def stop(self) -> None:
        llm, self._llm, self._stopped = self._llm, None, True
        if llm is None and self._reports is not None:
            self._reports.kill_core()  # it is starting
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would log the core's end as an error
            try:
                await asyncio.to_thread(llm.shutdown)
            except RuntimeError:  # the interpreter is exiting and starts no more threads
                llm.shutdown()
        if self._grammars is not None:
            await self._grammars.close()
        if self._files is not None:
            self._files.close()
            self._files = None
