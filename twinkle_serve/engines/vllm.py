"""The vllm engine: AsyncLLM with PagedAttention, continuous batching and the prefix cache."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import signal
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.adapters import not_in_model
from twinkle_serve.checkpoint import Bucket
from twinkle_serve.data_format.adapters import AdapterFiles, AdapterVersion
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group
from twinkle_serve.data_format.samples import FloatArray, PartialSample, PromptScores, SampleColumns, StopReason
from twinkle_serve.data_format.weights import INITIAL_LABEL, PauseMode, Spans
from twinkle_serve.engines.base import TokenDelta, columns_of_group, most_new_tokens, spans_from, stop_cut
from twinkle_serve.engines.tmpfs import PREFIX, MemoryDirectory
from twinkle_serve.errors import (
    AdapterError,
    EngineArgsError,
    EngineCrashedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    SamplingParamsError,
    TwinkleServeError,
    UnsupportedError,
    WeightsError,
    unknown_name,
)

OURS = {
    "model": "model_id",
    "tokenizer": "model_id",
    "tensor_parallel_size": "device_mesh.tp_size",
    "pipeline_parallel_size": "device_mesh.pp_size",
    "data_parallel_size": "device_mesh.dp_size",
    "distributed_executor_backend": "device_mesh",
    "trust_remote_code": "trust_remote_code of args",
    "seed": "the seed of each request's sampling parameters",
    "worker_extension_cls": "Twinkle Serve, which has one of its own",
    "lora_modules": "adapters of args",
}
"""Engine arguments that something else decides."""


@functools.cache
def argument_names() -> frozenset[str]:
    """Names of the arguments of the installed vLLM's AsyncEngineArgs.

    Read from its source: importing it takes 10 s, and a misspelt argument should be named at once.

    Raises:
        EngineArgsError: vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise EngineArgsError(
            "engine: vllm, but vLLM is not installed. Run scripts/install or pip install 'twinkle-serve[cpu]' "
            "(with a GPU: [cuda]), or set engine: torch."
        )
    tree = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("EngineArgs")]
    fields = (statement for node in classes for statement in node.body if isinstance(statement, ast.AnnAssign))
    return frozenset(field.target.id for field in fields if isinstance(field.target, ast.Name))


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Refuses arguments that this vLLM does not have, and those that another key decides.

    Raises:
        EngineArgsError
    """
    known = argument_names()
    for name in engine_args:
        if name in OURS:
            raise EngineArgsError(f"engine_args.{name} is decided by {OURS[name]}. Set that, and leave this out.")
        if name not in known:
            close = unknown_name("vllm engine argument", name, known).split(" Known:")[0]
            raise EngineArgsError(f"{close} engine_args takes the {len(known)} arguments of vLLM's AsyncEngineArgs.")


def cpu_defaults(model: str, engine_args: Mapping[str, Any], devices_on_node: int) -> dict[str, Any]:
    """Arguments that vLLM's CPU backend needs and does not choose by itself; the config's own win.

    Chunked prefill is off: together with a request seed it kills the engine (vllm 0.32, `get_offset` of a CPU
    generator in gpu_model_runner). To be removed when that call is gone. KV cache: vLLM would give each engine 90% of
    the node's memory. A model in float32 stays so: vLLM would make it bfloat16.
    """
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    defaults: dict[str, Any] = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": min(4 * 2**30, memory_bytes // (4 * devices_on_node)),
        "enable_chunked_prefill": False,
    }
    written = json.loads((Path(model) / "config.json").read_text())
    if written.get("dtype", written.get("torch_dtype")) == "float32":
        defaults["dtype"] = "float32"
    return {**defaults, **engine_args}


def keep_log_handlers(files: MemoryDirectory) -> None:
    """Has vLLM set up its logging without closing the handlers that this process has.

    vLLM's own configuration closes them all, Serve's among them; a controller that is replaced then asks the replica
    for its log file, gets an AttributeError, and kills it (vllm 0.32, ray 2.60; not needed when vLLM's is incremental).
    """
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    given = os.environ.get("VLLM_LOGGING_CONFIG_PATH", PREFIX)
    if PREFIX in given:  # nobody's, or an earlier engine's
        config = {"version": 1, "incremental": True, "loggers": {"vllm": {"level": level}}}
        # vLLM's own processes read it too.
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(files.write("logging.json", json.dumps(config)))


FIRST_TOKEN_PERIOD_S = 0.01
"""How often a sample whose time is over, and that has no token yet, is looked at."""


class AdapterSlots:
    """Holds back groups of more adapters than may run at the same time, first come, first served.

    On CPU vLLM has one slot more than it may fill (`WorkerExtension.keep_last_slot_empty`), and its scheduler does not
    know.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._running: Counter[int] = Counter()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def holding(self, adapter: AdapterVersion | None) -> AsyncGenerator[None, None]:
        """Waits for a slot. The base model needs none."""
        if adapter is None:
            yield
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((adapter.id, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._running[adapter.id] -= 1
                self._running += Counter()  # forgets those that nothing runs of
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            adapter_id, turn = self._waiting[0]
            if not turn.cancelled():
                if adapter_id not in self._running and len(self._running) >= self._slots:
                    return
                self._running[adapter_id] += 1
                turn.set_result(None)
            self._waiting.popleft()


class VLLMEngine:
    """One AsyncLLM. See `Engine` for what is guaranteed."""

    info: EngineInfo

    def __init__(
        self,
        name: str,
        model: str,
        engine_args: Mapping[str, Any],
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
            executor: mp (one node) or ray (a placement group over several).
            cpus: on CPU, the cores of each of the tp_size * pp_size workers.
            devices_on_node: on CPU, devices of all engines that share the node's memory.
        """
        self._name = name
        self._model = model
        self._given_args = dict(engine_args)
        self._device = device
        self._tp_size, self._pp_size = tp_size, pp_size
        self._executor = executor
        self._cpus = [tuple(cores) for cores in cpus]
        self._devices_on_node = devices_on_node
        self._trust_remote_code = trust_remote_code
        self._llm: Any = None
        self._request_ids = itertools.count()
        self._files: MemoryDirectory | None = None
        self._lora_requests: dict[int, Any] = {}
        """vLLM's name of each adapter version, by its id."""
        self._label = INITIAL_LABEL
        """Of the weights that it holds."""
        self._slots: AdapterSlots | None = None
        self._resumable: dict[Attempt, str] = {}
        """vLLM's request ids of the groups that run and may be resumed."""
        self._ended_tokens = 0
        """Tokens of the samples that have ended."""

    async def start(self) -> None:
        check_engine_args(self._given_args)
        if self._device == "cpu" and self._cpus:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, cores)) for cores in self._cpus)
        self._files = MemoryDirectory()
        keep_log_handlers(self._files)
        # Workers are processes of their own: forked ones would inherit this process's threads and event loop.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        await asyncio.to_thread(self._start)
        config = self._llm.vllm_config
        lora = config.lora_config
        await self._llm.update_weight_version(INITIAL_LABEL)
        if lora is not None:
            await self._llm.collective_rpc("take_lora_off_the_head")
            if self._device == "cpu":
                await self._llm.collective_rpc("keep_last_slot_empty")
                self._slots = AdapterSlots(lora.max_loras - 1)
        vocab_size = config.model_config.get_vocab_size()
        self.info = EngineInfo(
            name=self._name,
            kind="vllm",
            max_model_len=config.model_config.max_model_len,
            scores_full_context=False,
            vocab_size=vocab_size,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_logprobs=vocab_size if config.model_config.max_logprobs == -1 else config.model_config.max_logprobs,
            logprobs_mode=config.model_config.logprobs_mode,
            device=self._device,
            cpus=tuple(sorted({core for cores in self._cpus for core in cores})),
            max_lora_rank=0 if lora is None else lora.max_lora_rank,
        )
        self._tokenizer = self._llm.get_tokenizer()

    def _start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = dict(self._given_args)
        if self._device == "cpu":
            args = cpu_defaults(self._model, args, self._devices_on_node)
            if args.get("enable_lora"):
                args["max_loras"] = args.get("max_loras", 1) + 1  # see AdapterSlots
                if args.get("max_cpu_loras") is not None:
                    args["max_cpu_loras"] = max(args["max_cpu_loras"], args["max_loras"])
        args.setdefault("disable_log_stats", True)
        args["worker_extension_cls"] = "twinkle_serve.engines.vllm_worker.WorkerExtension"
        try:
            vllm_args = AsyncEngineArgs(
                model=self._model,
                tensor_parallel_size=self._tp_size,
                pipeline_parallel_size=self._pp_size,
                distributed_executor_backend=self._executor,
                trust_remote_code=self._trust_remote_code,
                # Engines of one seed would repeat each other's samples where a request has none.
                seed=int.from_bytes(os.urandom(4), "big") >> 1,
                **args,
            )
            config = vllm_args.create_engine_config()
        except (ValueError, TypeError) as error:
            raise EngineArgsError(f"vLLM refuses engine_args {self._given_args}: {error}") from error
        if self._device == "cuda" and config.lora_config and str(config.model_config.dtype) == "torch.float32":
            raise EngineArgsError(
                "engine_args.enable_lora with dtype float32: on a GPU vLLM's LoRA kernels take float16 and bfloat16 "
                "only. Set engine_args.dtype: bfloat16, or leave one of the two out."
            )
        scheduler = config.scheduler_config
        if self._device == "cpu" and scheduler.max_num_batched_tokens < config.model_config.max_model_len:
            raise EngineArgsError(
                f"engine_args.max_num_batched_tokens={scheduler.max_num_batched_tokens} is below "
                f"max_model_len={config.model_config.max_model_len}: on CPU a prompt is prefilled whole. "
                "Raise the one or lower the other."
            )
        try:
            self._llm = AsyncLLM.from_vllm_config(
                config, enable_log_requests=vllm_args.enable_log_requests, disable_log_stats=vllm_args.disable_log_stats
            )
        except Exception as error:
            raise EngineStartError(f"{self._name}: vLLM did not start on {self._model!r}: {error}") from error

    async def _outputs(self, group: Group, *, as_they_come: bool) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of a group: the last one, whole, or one a step with what is new.

        Raises:
            AdapterError, SamplingParamsError, EngineDeadError, EngineError
        """
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        # The parts of a split group, and its later attempts, share its id; vLLM's request ids must differ.
        request_id = f"{group.id}-{next(self._request_ids)}"
        lora_request = None if group.adapter is None else self._lora_requests.get(group.adapter.id)
        if group.adapter is not None and lora_request is None:
            raise AdapterError(f"{self._name} has no adapter {group.adapter.label}.")
        if group.resume:
            self._resumable[group.attempt] = request_id
        try:
            slot = contextlib.nullcontext() if self._slots is None else self._slots.holding(group.adapter)
            async with slot:
                prompt = tokens_input(group.prompt_ids.tolist())
                params = self._sampling_params(group, as_they_come=as_they_come)
                stream = self._llm.generate(prompt, params, request_id, lora_request=lora_request)
                async with contextlib.aclosing(stream), self._limited(request_id, group.sample_timeout_s):
                    async for output in stream:
                        yield output
        except VLLMEngineDeadError as error:
            raise self._death() from error
        except (VLLMClientError, ValueError, TypeError) as error:
            raise SamplingParamsError(f"vLLM refuses the request: {error}") from error
        except Exception as error:
            raise EngineError(f"{self._name}: vLLM failed on a request: {error.__cause__ or error}") from error
        finally:
            self._resumable.pop(group.attempt, None)

    @contextlib.asynccontextmanager
    async def _limited(self, request_id: str, limit_s: float | None) -> AsyncGenerator[None, None]:
        """Has a request end where it is, as if vLLM had aborted it, if it runs for longer."""
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
        while not self._has_tokens(request_id):  # noqa: ASYNC110  # vLLM has no event for it; a sample has one at least
            await asyncio.sleep(FIRST_TOKEN_PERIOD_S)
        with contextlib.suppress(Exception):  # of an engine that died meanwhile
            await self._llm.abort(request_id)

    def _has_tokens(self, request_id: str) -> bool:
        processor = self._llm.output_processor
        states = [processor.request_states.get(internal) for internal in processor.external_req_ids.get(request_id, ())]
        return all(state is None or state.detokenizer.num_output_tokens() for state in states)

    def _death(self) -> EngineDeadError:
        """What ended vLLM's process: itself, or somebody else."""
        manager = self._llm.engine_core.resources.engine_manager
        codes = [process.exitcode for process in getattr(manager, "processes", [])]
        # None: it has said that it failed, and is still on its way out.
        by_itself = any(code not in (0, -signal.SIGKILL, -signal.SIGTERM) for code in codes)
        kind = EngineCrashedError if by_itself else EngineDeadError
        how = f", exit code {', '.join(map(str, codes))}" if by_itself else ""
        return kind(f"{self._name}: vLLM's engine process died{how}. It is being restarted.")

    def progress(self) -> int:
        live = self._llm.output_processor.request_states.values()
        running: int = sum(state.detokenizer.num_output_tokens() for state in live)
        return self._ended_tokens + running

    def partial_output(self, group: Group, offset: int) -> PartialSample | None:
        # To stream the tokens instead would cost an output a token, where one at the end is enough.
        processor, k = self._llm.output_processor, group.params.logprobs
        internal = processor.external_req_ids.get(self._resumable.get(group.attempt))  # one: the group is one sample
        state = processor.request_states.get(internal[0]) if internal else None
        if state is None or state.detokenizer.num_output_tokens() <= offset:
            return None
        logprobs = logprob_tokens = None
        if k is not None:
            flat, first = state.logprobs_processor.logprobs, offset * (1 + k)
            logprobs = np.array(flat.logprobs[first:], np.float32).reshape(-1, 1 + k)
            if k:
                logprob_tokens = np.array(flat.token_ids[first:], np.int32).reshape(-1, 1 + k)
        return PartialSample(
            tokens=np.array(state.detokenizer.output_token_ids[offset:], np.int32),
            logprobs=logprobs,
            logprob_tokens=logprob_tokens,
            weight_versions=spans_from(state.weight_version_starts or ((self._label, 0),), offset),
        )

    async def sample_group(self, group: Group) -> SampleColumns:
        params = group.params
        output = await self._last_output(group)
        while _was_not_begun(output, group):  # a pause ended it
            output = await self._last_output(group)
        samples = await asyncio.gather(*(self._begun(group, j, sample) for j, sample in enumerate(output.outputs)))
        if params.greedy:  # vLLM refuses n greedy samples of a prompt; they are n times the same
            samples = samples * group.count
        reasons: list[StopReason] = [sample.finish_reason for sample in samples]
        if unfinished := set(reasons) - {"stop", "length", "abort"}:
            raise EngineError(f"{self._name}: vLLM ended a sample with {unfinished.pop()!r}.")
        weight_versions = [self._spans(sample) for sample in samples]
        self._ended_tokens += sum(len(sample.token_ids) for sample in samples)
        scores = None
        if params.prompt_logprobs is not None:
            scores = _prompt_scores(output.prompt_logprobs, group.prompt_ids, params.prompt_logprobs)
        if params.max_tokens == 0:
            empty: list[list[int]] = [[] for _ in samples]
            width = None if params.logprobs is None else 1 + params.logprobs
            return columns_of_group(
                group,
                self._name,
                empty,
                [""] * len(empty),
                ["length"] * len(empty),
                None if width is None else np.empty((0, width), np.float32),
                None if width in (None, 1) else np.empty((0, width), np.int32),
                scores,
                weight_versions,
            )
        tokens = [np.asarray(sample.token_ids, np.int32) for sample in samples]
        # vLLM's own text lacks the end-of-sequence token, so the text is made here, and cut as vLLM cuts its own.
        decoded = self._tokenizer.batch_decode(tokens, skip_special_tokens=False)
        for j, sample in enumerate(samples):
            if isinstance(sample.stop_reason, str):  # the stop string; a stop token is an int
                decoded[j] = decoded[j][: stop_cut(decoded[j], params.stop_strings)]
        logprobs, logprob_tokens = _sample_logprobs([sample.logprobs for sample in samples], params.logprobs)
        return columns_of_group(
            group, self._name, tokens, decoded, reasons, logprobs, logprob_tokens, scores, weight_versions
        )

    async def _last_output(self, group: Group) -> Any:
        """vLLM's output of a group, whole."""
        output: Any = None
        async with contextlib.aclosing(self._outputs(group, as_they_come=False)) as outputs:
            async for latest in outputs:
                output = latest
        return output

    async def _begun(self, group: Group, j: int, sample: Any) -> Any:
        """The j-th sample of a group; sampled anew where a pause ended it before its first token."""
        while sample.finish_reason == "abort" and not sample.token_ids:
            alone = replace(group, first_sample=group.first_sample + j, count=1, seed=group.seed_of(j))
            sample = (await self._last_output(alone)).outputs[0]
        return sample

    def _spans(self, sample: Any) -> Spans:
        """Which weights sampled what; a sample without tokens has those that are there."""
        spans = tuple((span.version, span.start) for span in sample.weight_versions or ())
        return spans or ((self._label, 0),)

    async def stream_tokens(self, group: Group) -> AsyncGenerator[TokenDelta, None]:
        started = over = False
        while not over:  # a pause may have ended it before it began
            async with contextlib.aclosing(self._outputs(group, as_they_come=True)) as outputs:
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
                    elif over:  # the token that vLLM samples nevertheless
                        yield TokenDelta(tokens=[], stop_reason="length")

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def _sampling_params(self, group: Group, *, as_they_come: bool) -> Any:
        from vllm.sampling_params import RequestOutputKind
        from vllm.sampling_params import SamplingParams as VLLMSamplingParams

        params = group.params
        return VLLMSamplingParams(
            n=1 if params.greedy else group.count,
            # vLLM always samples one token; for a score it is thrown away.
            max_tokens=max(1, most_new_tokens(self.info, group)),
            temperature=params.temperature,
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            repetition_penalty=params.repetition_penalty,
            # Child j of a request gets seed + j, as Group.seed_of.
            seed=group.seed,
            stop=list(params.stop_strings),
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            flat_logprobs=True,
            detokenize=bool(params.stop_strings),
            skip_special_tokens=False,
            output_kind=RequestOutputKind.DELTA if as_they_come else RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # nobody else has it; a deep copy is a third of what a sample costs this process
        )

    async def load_adapter(self, version: AdapterVersion, files: AdapterFiles) -> None:
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        assert self._files is not None
        try:
            path = await asyncio.to_thread(self._files.put, version, files)
            # The prefix cache and the worker tell adapters apart by name, path and id: each version has its own.
            request = LoRARequest(f"{version.label}#{version.id}", version.id, str(path))
            # One call: between two, another adapter may push this one out of the worker's memory.
            left_out = await self._llm.collective_rpc(
                "add_adapter", args=(request.lora_name, request.lora_int_id, request.lora_path)
            )
            if missing := set.intersection(*map(set, left_out)):
                await self._llm.remove_lora(version.id)
                raise not_in_model(missing)
        except BaseException as error:
            self._files.drop(version)
            if isinstance(error, VLLMEngineDeadError):
                raise self._death() from error
            if isinstance(error, OSError):
                size_bytes = len(files.config) + len(files.weights)
                raise AdapterError(
                    f"adapter {version.name!r} of {size_bytes} bytes cannot be written to {self._files.root}: {error}. "
                    "Make room there: with docker, --shm-size."
                ) from error
            if isinstance(error, Exception) and not isinstance(error, AdapterError):
                raise AdapterError(f"vLLM refuses adapter {version.name!r}: {error}") from error
            raise
        self._lora_requests[version.id] = request

    async def drop_adapter(self, version: AdapterVersion) -> None:
        assert self._files is not None
        if self._lora_requests.pop(version.id, None) is not None:
            await self._llm.remove_lora(version.id)
            self._files.drop(version)

    async def pause(self, mode: PauseMode) -> None:
        with self._dead_engines():
            # The caches are as good as before, unless other weights come.
            await self._llm.pause_generation(mode=mode, clear_cache=False)

    async def resume(self) -> None:
        with self._dead_engines():
            await self._llm.resume_generation()

    async def load_weights(self, label: str, buckets: AsyncIterable[Bucket]) -> str:
        assert self._files is not None
        try:
            begun = False
            async for bucket in buckets:
                with self._files.holding(bucket) as path:
                    if not begun:  # the model is whole until the first bucket is there
                        await self._llm.collective_rpc("begin_weights")
                        begun = True
                    await self._llm.collective_rpc("load_weights", args=(str(path),))
            checksums = await self._llm.collective_rpc("finish_weights")
            # Running samples compute anew what they had computed with the old weights.
            await self._llm.reset_prefix_cache(reset_running_requests=True)
            await self._llm.update_weight_version(label)
        except TwinkleServeError:
            raise
        except OSError as error:
            raise EngineError(
                f"{self._name}: weights cannot be written to {self._files.root}: {error}. Make room there: with "
                "docker, --shm-size."
            ) from error
        except Exception as error:
            if self._llm.errored:
                raise self._death() from error
            raise WeightsError(f"vLLM refuses weights {label!r}: {error}") from error
        self._label = label
        return " ".join(checksums)

    @contextlib.contextmanager
    def _dead_engines(self) -> Iterator[None]:
        """vLLM's error of a dead engine as ours."""
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        try:
            yield
        except VLLMEngineDeadError as error:
            raise self._death() from error

    async def reset_prefix_cache(self) -> None:
        if not await self._llm.reset_prefix_cache():
            raise EngineError(f"{self._name}: vLLM did not reset its prefix cache: its blocks are in use. Try again.")

    async def sleep(self, level: int) -> None:
        if self._device == "cpu":
            raise UnsupportedError(f"{self._name} runs on cpu, where sleep frees nothing. Leave it out.")
        if not self._llm.vllm_config.model_config.enable_sleep_mode:
            raise UnsupportedError("sleep needs engine_args.enable_sleep_mode: true. Start the service with it.")
        await self._llm.sleep(level)

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        if self._device == "cpu":
            raise UnsupportedError(f"{self._name} runs on cpu, where nothing sleeps. Leave wake_up out.")
        await self._llm.wake_up(None if tags is None else list(tags))

    async def check_health(self) -> None:
        if self._llm is None or self._llm.errored:
            raise self._death() if self._llm else EngineDeadError(f"{self._name} is stopped.")

    async def stop(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            try:
                await asyncio.to_thread(llm.shutdown)
            except RuntimeError:  # the interpreter is exiting, and starts no threads any more
                llm.shutdown()
        if self._files is not None:
            self._files.close()
            self._files = None


def _was_not_begun(output: Any, group: Group) -> bool:
    """Whether an abort ended a group before anything of it was there."""
    if all(sample.finish_reason != "abort" for sample in output.outputs):
        return False
    if group.params.prompt_logprobs is not None and output.prompt_logprobs is None:
        return True
    return not any(sample.token_ids for sample in output.outputs)


def _sample_logprobs(flat: Sequence[Any], k: int | None) -> tuple[FloatArray | None, NDArray[np.int32] | None]:
    """vLLM's FlatLogprobs of each sample as columns: [T, 1 + k], the sampled token first."""
    if k is None:
        return None, None
    logprobs = np.concatenate([np.asarray(part.logprobs, np.float32) for part in flat]).reshape(-1, 1 + k)
    if k == 0:
        return logprobs, None
    return logprobs, np.concatenate([np.asarray(part.token_ids, np.int32) for part in flat]).reshape(-1, 1 + k)


def _prompt_scores(flat: Any, prompt_ids: NDArray[np.int32], k: int) -> PromptScores:
    """vLLM's FlatLogprobs of a prompt, nothing at position 0, then the prompt's token and the k likeliest."""
    logprobs = np.asarray(flat.logprobs, np.float32).reshape(-1, 1 + k)
    tokens = np.asarray(flat.token_ids, np.int32).reshape(-1, 1 + k)
    assert len(tokens) == len(prompt_ids) - 1, (tokens.shape, len(prompt_ids))
    none = np.full((1, 1 + k), np.nan, np.float32)
    logprobs = np.concatenate([none, logprobs])
    tokens = np.concatenate([np.full((1, 1 + k), -1, np.int32), tokens])
    return PromptScores(logprobs=logprobs[:, 0], top_tokens=tokens[:, 1:], top_logprobs=logprobs[:, 1:])
