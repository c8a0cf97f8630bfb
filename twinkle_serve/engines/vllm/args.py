"""Arguments and environment that vLLM starts with."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from twinkle_serve.data_format.groups import EngineInfo
from twinkle_serve.data_format.sampling_params import MAX_NAMED_TOKENS, LogprobsMode
from twinkle_serve.engines.vllm.processes import EXTENSION, IN_CORE, has_intel_openmp, prefer_spawn
from twinkle_serve.engines.vllm.tmpfs import EngineFiles
from twinkle_serve.errors import EngineArgsError, unknown_name
from twinkle_serve.memory_files import PREFIX
from twinkle_serve.tensors import stored_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

SET_ELSEWHERE = {
    "model": "model_id",
    "tokenizer": "model_id",
    "tensor_parallel_size": "device_mesh.tp_size",
    "pipeline_parallel_size": "device_mesh.pp_size",
    "data_parallel_size": "device_mesh.dp_size",
    "distributed_executor_backend": "device_mesh",
    "trust_remote_code": "trust_remote_code of args",
    "seed": "the seed of each request's sampling parameters",
    "worker_extension_cls": "Twinkle Serve, which uses its own",
    "lora_modules": "adapters of args",
}
"""Engine arguments that are set elsewhere, and where."""


DEFAULT_MAX_LOGPROBS = 20
"""vLLM's."""


@functools.cache
def argument_names() -> frozenset[str]:
    """Returns the argument names of the installed vLLM's AsyncEngineArgs.

    Parsed from its source, because importing vLLM takes 10 s and a misspelt argument should be reported at once.

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


def check_engine_args(engine_args: Mapping[str, object]) -> None:
    """Rejects arguments that the installed vLLM does not have, and arguments that are set elsewhere.

    Raises:
        EngineArgsError
    """
    known = argument_names()
    for name in engine_args:
        if name in SET_ELSEWHERE:
            raise EngineArgsError(f"engine_args.{name} is decided by {SET_ELSEWHERE[name]}. Set that and remove this.")
        if name not in known:
            close = unknown_name("vllm engine argument", name, known).split(" Known:")[0]
            raise EngineArgsError(f"{close} engine_args takes the {len(known)} arguments of vLLM's AsyncEngineArgs.")


def cpu_defaults(model: str, engine_args: Mapping[str, object], devices_on_node: int) -> dict[str, Any]:
    """Returns `engine_args` with the defaults that vLLM's CPU backend needs and does not choose by itself.

    Chunked prefill is off: combined with a request seed it crashes the engine (vllm 0.32, `get_offset` of a CPU
    generator in gpu_model_runner). Remove once that call is gone. KV cache: vLLM would give each engine 90% of the
    node's memory. float32 models stay float32: vLLM would convert them to bfloat16.
    """
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    defaults: dict[str, object] = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": min(4 * 2**30, memory_bytes // (4 * devices_on_node)),
        "enable_chunked_prefill": False,
    }
    config = json.loads((Path(model) / "config.json").read_text())
    if config.get("dtype", config.get("torch_dtype")) == "float32":
        defaults["dtype"] = "float32"
    return {**defaults, **engine_args}


def keep_log_handlers(files: EngineFiles) -> None:
    """Makes vLLM configure its logging without closing this process's handlers.

    vLLM's own configuration closes them all, including Serve's. A restarted controller then asks the replica for its
    log file, gets an AttributeError, and kills the replica (vllm 0.32, ray 2.60). Remove once vLLM's configuration is
    incremental.
    """
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    given = os.environ.get("VLLM_LOGGING_CONFIG_PATH", PREFIX)
    if PREFIX in given:  # unset, or set by an earlier engine
        config = {"version": 1, "incremental": True, "loggers": {"vllm": {"level": level}}}
        # vLLM's child processes read it too.
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(files.write("logging.json", json.dumps(config)))


def set_environment(files: EngineFiles, cpus: Sequence[Sequence[int]]) -> None:
    """Sets the environment variables that vLLM reads.

    Args:
        cpus: the cores of each worker; empty leaves them unbound.
    """
    if cpus:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, cores)) for cores in cpus)
    # vLLM's core would fail requests where other load slows the compilation of their expression.
    os.environ.setdefault("VLLM_REGEX_COMPILATION_TIMEOUT_S", "0")
    keep_log_handlers(files)
    prefer_spawn()


def build_config(
    model: str,
    engine_args: Mapping[str, object],
    *,
    device: str,
    tp_size: int,
    pp_size: int,
    executor: str,
    devices_on_node: int,
    trust_remote_code: bool,
) -> tuple[AsyncEngineArgs, VllmConfig]:
    """Builds vLLM's arguments, and its configuration from them. The parameters are those of `VLLMEngine`.

    Raises:
        EngineArgsError: vLLM refuses the arguments, or would fail with them after its start.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    args: dict[str, Any] = dict(engine_args)
    if device == "cpu":
        args = cpu_defaults(model, args, devices_on_node)
        if args.get("enable_lora"):
            args["max_loras"] = args.get("max_loras", 1) + 1  # see AdapterSlots
            if args.get("max_cpu_loras") is not None:
                args["max_cpu_loras"] = max(args["max_cpu_loras"], args["max_loras"])
        if args.get("max_logprobs", DEFAULT_MAX_LOGPROBS) != -1:
            args["max_logprobs"] = args.get("max_logprobs", DEFAULT_MAX_LOGPROBS) + MAX_NAMED_TOKENS
    traced = args.get("otlp_traces_endpoint") is not None
    args.setdefault("disable_log_stats", not traced)
    if traced and args["disable_log_stats"]:  # vLLM would end at the first sample
        raise EngineArgsError(
            "engine_args: vLLM makes its spans of its statistics: otlp_traces_endpoint needs disable_log_stats: false. "
            "Leave disable_log_stats out."
        )
    args["worker_extension_cls"] = EXTENSION
    workers = tp_size * pp_size * args.get("prefill_context_parallel_size", 1)
    try:
        vllm_args = AsyncEngineArgs(
            model=model,
            tensor_parallel_size=tp_size,
            pipeline_parallel_size=pp_size,
            distributed_executor_backend=executor_backend(executor, workers, device),
            trust_remote_code=trust_remote_code,
            # With equal seeds, engines would repeat each other's samples for requests without a seed.
            seed=int.from_bytes(os.urandom(4), "big") >> 1,
            **args,
        )
        config = vllm_args.create_engine_config()
    except (ValueError, TypeError) as error:
        raise EngineArgsError(f"vLLM refuses engine_args {dict(engine_args)}: {error}") from error
    _check_config(config, device)
    use_one_grammar_backend(config)
    if device == "cpu" and "kv_cache_memory_bytes" not in engine_args and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        limit_kv_cache(config)
    return vllm_args, config


def engine_info(
    name: str,
    config: VllmConfig,
    device: str,
    cpus: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> EngineInfo:
    """Describes an engine to its router. The parameters are those of `VLLMEngine`."""
    model, lora, transfer = config.model_config, config.lora_config, config.weight_transfer_config
    most = model.get_vocab_size() if model.max_logprobs == -1 else model.max_logprobs
    return EngineInfo(
        name=name,
        kind="vllm",
        max_model_len=model.max_model_len,
        scores_full_context=False,
        vocab_size=model.get_vocab_size(),
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_logprobs=most - MAX_NAMED_TOKENS if device == "cpu" and model.max_logprobs != -1 else most,
        logprobs_mode=model.logprobs_mode,
        device=device,
        cpus=tuple(sorted({core for cores in cpus for core in cores})),
        max_lora_rank=0 if lora is None else lora.max_lora_rank,
        dtype=stored_dtype(model.dtype),
        adapter_dtype="" if lora is None else stored_dtype(lora.lora_dtype),
        eos_token_ids=_eos_token_ids(config, tokenizer),
        lacks=_lacks(config, device),
        masks_raw_logprobs=device != "cpu" or config.speculative_config is not None,
        transfer_backend="" if transfer is None else transfer.backend,
        workers=config.parallel_config.world_size,
    )


def _eos_token_ids(config: VllmConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids that vLLM takes for ends of a sequence: the tokenizer's and those of the generation config."""
    given = config.model_config.try_get_generation_config().get("eos_token_id") or []
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(sorted({*own, *([given] if isinstance(given, int) else given)}))


def _lacks(config: VllmConfig, device: str) -> dict[str, str]:
    """See `EngineInfo.lacks`."""
    lacks: dict[str, str] = {}
    reasoning = config.reasoning_config
    if reasoning is None or not reasoning.enabled:
        lacks["thinking_token_budget"] = (
            "the engine does not know how the model marks its thinking. Set engine_args.reasoning_config to "
            "{reasoning_start_str: …, reasoning_end_str: …}."
        )
    if config.speculative_config is not None:
        for name in ("logprobs_mode", "logprob_token_ids", "return_sampling_mask", "thinking_token_budget"):
            lacks[name] = "not with speculative decoding. Remove engine_args.speculative_config."
    elif device != "cpu":
        lacks["logprobs_mode"] = (
            f"on a GPU an engine has one, and this one's is {config.model_config.logprobs_mode}. Set "
            "engine_args.logprobs_mode."
        )
        if not config.model_config.return_sampling_mask:
            lacks["return_sampling_mask"] = (
                "on a GPU vLLM needs engine_args.return_sampling_mask: true, and then top_k in every call."
            )
    return lacks


def executor_backend(executor: str, workers: int, device: str) -> str:
    """Returns vLLM's executor for an engine: one worker runs in the core, unless Ray starts it.

    Args:
        executor: that for several workers, mp or ray.
    """
    if executor == "ray" or workers > 1 or (device == "cpu" and has_intel_openmp()):
        return executor
    return IN_CORE if device == "cpu" else "uni"


def limit_kv_cache(config: VllmConfig) -> None:
    """Lowers the KV cache to what max_num_seqs sequences of max_model_len fill: vLLM writes zeros to all of it as it
    starts, 0.5 to 1.8 s for 1 GiB on CPU.

    Models whose layers differ, or keep something other than keys and values, keep all of it.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    if model.is_hybrid or model.use_mla or cache.kv_cache_memory_bytes is None:
        return
    values = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    tokens = config.scheduler_config.max_num_seqs * (model.max_model_len + cache.block_size)
    cache.kv_cache_memory_bytes = min(cache.kv_cache_memory_bytes, tokens * values * model.dtype.itemsize)


def use_one_grammar_backend(config: VllmConfig) -> None:
    """Replaces `auto`, vLLM's default for structured outputs, by xgrammar, which is its first choice.

    With `auto`, vLLM validates each request for the backend that suits it, but compiles them all with the backend of
    the first one (vllm 0.32, StructuredOutputManager.grammar_init): xgrammar then ignores unsupported keywords.
    Remove once the core has a backend for each.
    """
    if config.structured_outputs_config.backend == "auto":
        config.structured_outputs_config.backend = "xgrammar"


def _check_config(config: VllmConfig, device: str) -> None:
    """Rejects configurations that would fail after vLLM's start."""
    if device == "cuda" and config.lora_config and str(config.model_config.dtype) == "torch.float32":
        raise EngineArgsError(
            "engine_args.enable_lora with dtype float32: on a GPU vLLM's LoRA kernels support float16 and bfloat16 "
            "only. Set engine_args.dtype: bfloat16, or remove enable_lora."
        )
    if (mode := config.model_config.logprobs_mode) not in (modes := get_args(LogprobsMode)):
        raise EngineArgsError(f"engine_args.logprobs_mode={mode}: samples have logprobs. Set {' or '.join(modes)}.")
    scheduler = config.scheduler_config
    if device == "cpu" and scheduler.max_num_batched_tokens < config.model_config.max_model_len:
        raise EngineArgsError(
            f"engine_args.max_num_batched_tokens={scheduler.max_num_batched_tokens} is below "
            f"max_model_len={config.model_config.max_model_len}: on CPU a prompt is prefilled in one "
            "batch. Raise max_num_batched_tokens or lower max_model_len."
        )
