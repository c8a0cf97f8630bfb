"""The Sampler interface, and what every running sampler has in common."""

from __future__ import annotations

import contextlib
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from twinkle_serve.adapters import pack_adapter
from twinkle_serve.checkpoint import BUCKET_BYTES, buckets, named_tensors
from twinkle_serve.data_format import SampleResponse, SamplingParams
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.data_format.sampling_params import UNSET, Unset
from twinkle_serve.data_format.weights import PauseMode
from twinkle_serve.errors import AdapterError, RequestError, TwinkleServeError, UnsupportedError
from twinkle_serve.routing.templates import TemplateChoice, pack_template
from twinkle_serve.sampler.verification import Verification, verify
from twinkle_serve.template import Template


class Sampler(ABC):
    """Generates a model's output. Source of the interface: Twinkle's Sampler."""

    @abstractmethod
    def sample(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        *,
        num_samples: int | None = None,
    ) -> SampleResponse:
        """Samples each input `num_samples` times."""

    def add_adapter_to_model(
        self, adapter_name: str, config_or_dir: Any, *, state_dict: Mapping[str, Any] | None = None
    ) -> str:
        """Adds a LoRA adapter. Returns its version."""
        raise UnsupportedError(f"{type(self).__name__} has no adapters.")

    def set_template(self, template_cls: Template | type[Template] | str, **kwargs: Any) -> None:
        """Sets how messages become tokens."""
        raise UnsupportedError(f"{type(self).__name__} has no templates.")


class Backend(Protocol):
    """Where a sampler's router is: in this process, or behind a Serve handle. Methods are those of `routing.Router`.

    Every call raises a TwinkleServeError; one that is abandoned is cancelled there.
    """

    def call(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        """Calls a method and waits. `timeout_s` bounds what the method itself does not."""

    async def call_async(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        """As `call`, on the caller's event loop."""

    def iterate(self, method: str, *args: Any, **options: Any) -> Iterator[Any]:
        """Items of a method that yields. Sent at once; what is wrong with it is raised by the first `next`, but for
        inputs that cannot be sent."""

    def iterate_async(self, method: str, *args: Any, **options: Any) -> AsyncIterator[Any]:
        """As `iterate`, on the caller's event loop."""

    def put_large(self, data: Any) -> Any:
        """What stands for much data in the arguments of a call."""

    def shutdown(self) -> None:
        """Ends the sampler and frees its devices. Again: nothing."""


Transport: TypeAlias = Literal["store"]
"""How weights reach the engines."""

ANSWER_TIMEOUT_S = 60.0
"""Calls that do next to nothing."""

CONTROL_TIMEOUT_S = 600.0
"""Calls that sample nothing: loading an adapter on every engine is the longest of them."""


class Pause:
    """A pause of every engine, until `resume` or the end of a `with` block.

    Guarantees: it ends within its lease when this process is gone.
    """

    def __init__(self, backend: Backend, mode: PauseMode, lease_s: float) -> None:
        self._backend = backend
        self._lease_s = lease_s
        # Draining may take as long as samples do.
        self._lease: int = backend.call("pause", mode, lease_s, timeout_s=CONTROL_TIMEOUT_S)
        self._ended = threading.Event()
        threading.Thread(target=self._renew, name="pause", daemon=True).start()

    def _renew(self) -> None:
        while not self._ended.wait(self._lease_s / 3):
            # One that is lost is said by `resume`.
            with contextlib.suppress(TwinkleServeError):
                self._backend.call("renew_pause", self._lease, self._lease_s, timeout_s=self._lease_s)

    def resume(self) -> None:
        """Has the engines go on. Again: nothing.

        Raises:
            EngineError: the pause had ended before, because the router was restarted or could not be reached.
        """
        if not self._ended.is_set():
            self._ended.set()
            self._backend.call("resume", self._lease, timeout_s=ANSWER_TIMEOUT_S)

    def __enter__(self) -> Pause:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is None:
            self.resume()
        else:
            with contextlib.suppress(TwinkleServeError):  # what ended the block says more
                self.resume()


class Rollouts(Iterator[SampleResponse]):
    """Responses to the prompts of a call as they finish, while others of them can be cancelled."""

    def __init__(self, backend: Backend, request_id: str, responses: Iterator[SampleResponse]) -> None:
        self._backend, self._request_id, self._responses = backend, request_id, responses

    def __next__(self) -> SampleResponse:
        return next(self._responses)

    def cancel(self, prompt_indices: Iterable[int] | None = None) -> int:
        """Has prompts sampled no more: these, or all that are not complete. The others go on.

        Returns how many of them were not complete; those do not come.
        """
        indices = None if prompt_indices is None else list(prompt_indices)
        dropped: int = self._backend.call("cancel", self._request_id, indices, timeout_s=ANSWER_TIMEOUT_S)
        return dropped

    def close(self) -> None:
        """Cancels the call, and ends this."""
        if isinstance(self._responses, Generator):
            self._responses.close()

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncRollouts(AsyncIterator[SampleResponse]):
    """As `Rollouts`, for async code."""

    def __init__(self, backend: Backend, request_id: str, parts: AsyncIterator[SampleResponse]) -> None:
        self._backend, self._request_id, self._parts = backend, request_id, parts
        self._arrived: list[SampleResponse] = []
        """Of the part that came last, those that were not read, in reverse."""

    async def __anext__(self) -> SampleResponse:
        while not self._arrived:
            self._arrived = list(await anext(self._parts))[::-1]
        return self._arrived.pop()

    async def cancel(self, prompt_indices: Iterable[int] | None = None) -> int:
        """See `Rollouts.cancel`."""
        indices = None if prompt_indices is None else list(prompt_indices)
        dropped: int = await self._backend.call_async("cancel", self._request_id, indices, timeout_s=ANSWER_TIMEOUT_S)
        return dropped

    async def aclose(self) -> None:
        """See `Rollouts.close`."""
        if isinstance(self._parts, AsyncGenerator):
            await self._parts.aclose()


class RunningSampler(Sampler):
    """A sampler with its engines, wherever they run.

    Guarantees: a call returns every sample that it asked for, or raises a TwinkleServeError; the next call works.
    Guarantees: inputs are never changed.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._template: TemplateChoice = None

    # -- sampling --------------------------------------------------------------------------------

    def sample(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        num_samples: int | None = None,
        logprobs: int | Unset | None = UNSET,
        use_base_model: bool = False,
        return_encoded: bool = False,
        timeout_s: float | None = None,
        sample_timeout_s: float | None = None,
        min_groups: int | None = None,
    ) -> SampleResponse:
        """Samples each input `num_samples` times. Not for async code: there, `sample_async`.

        Args:
            inputs: a Trajectory or InputFeature, or a list of either kind. Values may be lists, numpy or torch.
            sampling_params: SamplingParams or a dict of the same keys.
            adapter_name: LoRA adapter to sample with, `name` for its newest version or `name@version`; "" is the base
                model.
            adapter_path: directory of a LoRA adapter instead, on the router's node; read again when its files change.
            num_samples: samples of each prompt; None takes it from sampling_params, where it is 1.
            logprobs: as in sampling_params, which has 0: of each sampled token.
            use_base_model: the base model, said explicitly; with an adapter it is refused.
            return_encoded: Twinkle's; `new_input_feature` has the encoded prompt either way.
            timeout_s: deadline of the call in seconds, queueing included; None is the config's request_timeout_s.
            sample_timeout_s: seconds that each sample may take on its engine, waiting there and pauses included; then
                it ends where it is, with stop_reason abort.
            min_groups: return as soon as so many prompts are complete; the others are cancelled, and not in the
                response: `prompt_indices` says which are. None: all.

        Returns:
            A response whose `sequences` are flat and prompt-major; iterated over, one response a prompt.

        Raises:
            RequestError: the call cannot be served as it is: SamplingParamsError, PromptError, AdapterError.
            PoisonPromptError: a prompt of it ended several engines.
            QueueFullError: more waits already than the service takes; `retry_after_s` says when there may be room.
            DeadlineError: it took longer than `timeout_s`.
            EngineError: engines, or the router, failed.
        """
        response: SampleResponse = self._backend.call(
            "sample",
            inputs,
            timeout_s=timeout_s,
            sample_timeout_s=sample_timeout_s,
            min_groups=min_groups,
            **self._options(sampling_params, adapter_name, adapter_path, num_samples, logprobs, use_base_model),
        )
        return response

    async def sample_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        num_samples: int | None = None,
        logprobs: int | Unset | None = UNSET,
        use_base_model: bool = False,
        return_encoded: bool = False,
        timeout_s: float | None = None,
        sample_timeout_s: float | None = None,
        min_groups: int | None = None,
    ) -> SampleResponse:
        """As `sample`, for async code: an async actor, or `asyncio.run`."""
        response: SampleResponse = await self._backend.call_async(
            "sample",
            inputs,
            timeout_s=timeout_s,
            sample_timeout_s=sample_timeout_s,
            min_groups=min_groups,
            **self._options(sampling_params, adapter_name, adapter_path, num_samples, logprobs, use_base_model),
        )
        return response

    def sample_iter(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        num_samples: int | None = None,
        logprobs: int | Unset | None = UNSET,
        use_base_model: bool = False,
        timeout_s: float | None = None,
        sample_timeout_s: float | None = None,
        min_groups: int | None = None,
        progress: bool = False,
    ) -> Rollouts:
        """Yields the response to each prompt as it finishes, in any order; `prompt_index` says which it is.

        The call is sent at once; what the router finds wrong with it is raised by the first `next`. Arguments are those
        of `sample`; prompts can be cancelled while it runs.

        Args:
            progress: show a progress bar on the terminal.
        """
        options = self._options(sampling_params, adapter_name, adapter_path, num_samples, logprobs, use_base_model)
        limits = {"timeout_s": timeout_s, "sample_timeout_s": sample_timeout_s, "min_groups": min_groups}
        request_id = uuid.uuid4().hex
        parts = self._backend.iterate("sample_iter", inputs, request_id=request_id, **limits, **options)
        total = len(inputs) if isinstance(inputs, Sequence) else 1
        return Rollouts(self._backend, request_id, _each_prompt(parts, total, progress=progress))

    def sample_iter_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        num_samples: int | None = None,
        logprobs: int | Unset | None = UNSET,
        use_base_model: bool = False,
        timeout_s: float | None = None,
        sample_timeout_s: float | None = None,
        min_groups: int | None = None,
    ) -> AsyncRollouts:
        """As `sample_iter`, for async code. The call is sent by the first `anext`."""
        options = self._options(sampling_params, adapter_name, adapter_path, num_samples, logprobs, use_base_model)
        limits = {"timeout_s": timeout_s, "sample_timeout_s": sample_timeout_s, "min_groups": min_groups}
        request_id = uuid.uuid4().hex
        parts = self._backend.iterate_async("sample_iter", inputs, request_id=request_id, **limits, **options)
        return AsyncRollouts(self._backend, request_id, parts)

    def sample_stream(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        use_base_model: bool = False,
        timeout_s: float | None = None,
    ) -> Iterator[tuple[str, StopReason | None]]:
        """One sample of one prompt, as (delta_text, finish_reason) while it is being sampled.

        No delta splits a character; together they are the sample's `decoded`. finish_reason is None until the last.
        Closing the iterator aborts the sample.

        Raises:
            RequestError: as `sample`; or more than one prompt or sample.
        """
        deltas: Iterator[tuple[str, StopReason | None]] = self._backend.iterate(
            "sample_stream",
            inputs,
            timeout_s=timeout_s,
            **self._options(sampling_params, adapter_name, adapter_path, None, UNSET, use_base_model),
        )
        return deltas

    def sample_stream_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        use_base_model: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncIterator[tuple[str, StopReason | None]]:
        """As `sample_stream`, for async code."""
        deltas: AsyncIterator[tuple[str, StopReason | None]] = self._backend.iterate_async(
            "sample_stream",
            inputs,
            timeout_s=timeout_s,
            **self._options(sampling_params, adapter_name, adapter_path, None, UNSET, use_base_model),
        )
        return deltas

    def _options(
        self,
        sampling_params: Any,
        adapter_name: str,
        adapter_path: str | None,
        num_samples: int | None,
        logprobs: int | Unset | None,
        use_base_model: bool,
    ) -> dict[str, Any]:
        return {
            "sampling_params": sampling_params,
            "adapter_name": adapter_name,
            "adapter_path": _absolute(adapter_path) if adapter_path else None,
            "num_samples": num_samples,
            "logprobs": logprobs,
            "use_base_model": use_base_model,
            "template": self._template,
        }

    # -- scoring ---------------------------------------------------------------------------------

    def score(
        self,
        inputs: Any,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        top_logprobs: int = 0,
        use_base_model: bool = False,
        timeout_s: float | None = None,
    ) -> SampleResponse:
        """Logprob of every token of given sequences; nothing is sampled.

        Args:
            inputs: as of `sample`. Messages are scored as they stand, without a turn opened for the assistant.
            top_logprobs: how many of the likeliest tokens to return at each position too.

        Returns:
            One response an input: `prompt_token_ids`, `prompt_logprobs` (nats, None at position 0) and
            `topk_prompt_logprobs`.

        Raises:
            PromptError: a sequence that is longer than the engine can score: its context, less one for vllm.
        """
        params = SamplingParams(max_tokens=0, logprobs=None, prompt_logprobs=top_logprobs)
        return self.sample(
            inputs, params, adapter_name, adapter_path, use_base_model=use_base_model, timeout_s=timeout_s
        )

    def verify(
        self, response: SampleResponse, *, against: RunningSampler, adapter_name: str | None = None
    ) -> Verification:
        """Scores a response's samples on a second sampler, and compares logprobs token by token.

        Args:
            against: the second sampler, of the same model. A torch engine in float32 is a good one.
            adapter_name: adapter to score with there. None: against this sampler itself, the version that each sample
                names; against another, whatever has its name there.

        Raises:
            RequestError: the response has no logprobs, or not of the model's own distribution; or its samples are of
                two versions of an adapter, or of the model's own weights, and the other sampler has one.
            AdapterError: the other sampler has no such adapter, or has given that version up.
        """
        return verify(response, against, adapter_name, same_service=against._backend is self._backend)

    # -- adapters and templates ------------------------------------------------------------------

    def add_adapter_to_model(
        self, adapter_name: str, config_or_dir: Any, *, state_dict: Mapping[str, Any] | None = None
    ) -> str:
        """Loads a LoRA adapter on every engine; from then on its name means it. Returns `name@version`.

        Calls that run meanwhile, or were admitted with the name before, are sampled by what it meant then.

        Args:
            config_or_dir: a directory as peft's save_pretrained writes it, on the service's nodes; or peft's
                LoraConfig, with its tensors in `state_dict`.

        Raises:
            AdapterError: unreadable, not of this model, a rank above the limit, or LoRA is switched off.
            StoreError: the service's store cannot be reached or written.
                After either, the name means what it meant before.
        """
        if isinstance(config_or_dir, str) or hasattr(config_or_dir, "__fspath__"):
            if state_dict is not None:
                raise AdapterError("state_dict comes with a LoraConfig; the directory has weights of its own.")
            source: Any = _absolute(config_or_dir)
        else:
            source = pack_adapter(config_or_dir, state_dict)
        label: str = self._backend.call("add_adapter", adapter_name, source, timeout_s=CONTROL_TIMEOUT_S)
        return label

    def remove_adapter(self, adapter_name: str) -> None:
        """Takes an adapter's name away; calls that were admitted with it finish on it.

        Raises:
            AdapterError: no such adapter.
        """
        self._backend.call("remove_adapter", adapter_name, timeout_s=CONTROL_TIMEOUT_S)

    def set_template(self, template_cls: Template | type[Template] | str, **kwargs: Any) -> None:
        """Sets how this sampler object's calls turn messages into tokens; other callers are not affected.

        Args:
            template_cls: a registered name, a Template class or a Template.
            kwargs: arguments of the class; `model_id` names another model's tokenizer.

        Raises:
            TemplateError: no such template, or arguments that it does not take.
        """
        choice = pack_template(template_cls, kwargs)
        self._backend.call("check_template", choice, timeout_s=CONTROL_TIMEOUT_S)
        self._template = choice

    # -- weights ---------------------------------------------------------------------------------

    def update_weights(
        self,
        weights: Any,
        version: str,
        mode: PauseMode = "keep",
        *,
        transport: Transport = "store",
        allow_nonfinite: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> str:
        """Replaces the model's own weights on every engine. Returns `version`, which later samples are stamped with.

        The weights are sent first, while the engines go on sampling; then the engines pause, load them and go on.
        Adapters stay loaded. Engines that start later, or anew, start with them.

        Args:
            weights: every weight of the model by the name that its checkpoint has: a `state_dict`, pairs of name and
                tensor that are made as they are taken, or a directory with safetensors files, on this machine.
            version: label of these weights; each update has one of its own.
            mode: what becomes of running samples. keep: they go on, and `weight_versions` of each says which tokens are
                of which weights; what they had computed is computed anew. wait: they end first. abort: they end where
                they are, with stop_reason abort; those without a token begin anew.
            transport: store, through Ray's object store and files in memory.
            allow_nonfinite: take NaN and infinite values.
            bucket_bytes: about how much is sent at a time, and never less than one weight. A few buckets are in memory
                here, two at each engine.
            timeout_s: limit of each step: sending a bucket, and the engines' part of it all.

        Raises:
            WeightsError: names, shapes or values that cannot be, weights that are missing, a version that exists
                already, or another update that is under way.
            EngineError: an engine failed on it.
            StoreError: the store failed.
            DeadlineError: the engines were not done within `timeout_s`.
                After each, the weights before are current on all engines, and nobody is paused.
            UnsupportedError: no such transport, or a model without safetensors files.
            RequestError: another argument that cannot be, or a sampler that is asleep.
        """
        if transport != "store":
            raise UnsupportedError(f"transport must be store, got {transport!r}.")
        for what, value in (("timeout_s", timeout_s), ("bucket_bytes", bucket_bytes)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise RequestError(f"{what} must be a number above 0, got {value!r}.")
        parts = buckets(named_tensors(weights), bucket_bytes, allow_nonfinite=allow_nonfinite)
        upload: int = self._backend.call("begin_weights", version, mode, timeout_s=timeout_s)
        try:
            # The next bucket is made while the last one is on its way.
            with ThreadPoolExecutor(1, thread_name_prefix="weights") as sender:
                sent: Future[Any] | None = None
                for index, bucket in enumerate(parts):
                    if sent is not None:
                        sent.result()
                    sent = sender.submit(
                        self._backend.call,
                        "append_weights",
                        upload,
                        index,
                        self._backend.put_large(bucket),
                        timeout_s=timeout_s,
                    )
                if sent is not None:
                    sent.result()
            # Where it fails at the last moment, the engines go back within the same time, and the store may be slow.
            label: str = self._backend.call(
                "publish_weights", upload, mode, timeout_s, timeout_s=2 * timeout_s + CONTROL_TIMEOUT_S
            )
        except BaseException:
            with contextlib.suppress(TwinkleServeError):  # what is given up by itself when nothing comes of it
                self._backend.call("abandon_weights", upload, timeout_s=ANSWER_TIMEOUT_S)
            raise
        return label

    def pause(self, mode: PauseMode = "keep", *, lease_s: float = 30.0) -> Pause:
        """Has no engine sample anything until the pause is ended. Calls wait meanwhile, within their deadline.

        The pause is renewed from a thread of this process for as long as it lives; if it dies, the engines go on within
        `lease_s`.

        Args:
            mode: what becomes of running samples, as of `update_weights`.

        Returns:
            The pause: `resume()` ends it, or a `with` block around it.

        Raises:
            RequestError: no such mode, or a lease that is none.
        """
        return Pause(self._backend, mode, lease_s)

    # -- control ---------------------------------------------------------------------------------

    def get_state_keys(self) -> list[str]:
        """Names of the model's weights, as its checkpoint has them."""
        keys: list[str] = self._backend.call("state_keys", timeout_s=CONTROL_TIMEOUT_S)
        return keys

    def reset_prefix_cache(self) -> None:
        """Has every engine forget the keys and values of earlier prompts."""
        self._backend.call("reset_prefix_cache", timeout_s=CONTROL_TIMEOUT_S)

    def sleep(self, level: int = 1) -> None:
        """Frees the engines' device memory until `wake_up`; calls are refused meanwhile.

        Args:
            level: 1 keeps the weights in host memory; 2 drops them, and `wake_up` loads the current ones.

        Raises:
            UnsupportedError: an engine on CPU, torch, or vllm without engine_args.enable_sleep_mode.
            RequestError: calls are running.
        """
        self._backend.call("sleep", level, timeout_s=CONTROL_TIMEOUT_S)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Ends `sleep`.

        Args:
            tags: "weights" or "kv_cache" wake these alone; None wakes everything.
        """
        self._backend.call("wake_up", tags, timeout_s=CONTROL_TIMEOUT_S)

    def drain_engine(self, name: str, *, timeout_s: float = 600.0) -> None:
        """Gives an engine no new prompts, and returns when it has finished what it had. It stays out of use, whatever
        becomes of its process, until `undrain_engine` or `restart_engine`, or until the router is restarted.

        What is not finished after `timeout_s` is sampled by the other engines, with its seeds; a text stream fails.
        Where it was the last one in use, calls wait for another, within their deadlines.

        Args:
            name: as in `status()["engines"]`.

        Raises:
            RequestError: no such engine.
            UnsupportedError: an engine in this process.
        """
        self._backend.call("drain_engine", name, timeout_s, timeout_s=_patience_s(timeout_s))

    def undrain_engine(self, name: str) -> None:
        """Has a drained engine used again, as soon as it has the current weights. Again: nothing.

        Raises:
            RequestError: no such engine.
            UnsupportedError: an engine in this process.
        """
        self._backend.call("undrain_engine", name, timeout_s=ANSWER_TIMEOUT_S)

    def restart_engine(self, name: str, *, drain_timeout_s: float = 60.0, timeout_s: float = 1800.0) -> None:
        """Drains an engine for at most `drain_timeout_s`, has its process replaced, and returns when it is used again.

        Args:
            timeout_s: of all of it.

        Raises:
            RequestError: no such engine.
            UnsupportedError: an engine in this process.
            DeadlineError: it is not used again within `timeout_s`; it will be when it can.
        """
        patience_s = _patience_s(timeout_s)
        self._backend.call("restart_engine", name, drain_timeout_s, timeout_s, timeout_s=patience_s)

    def status(self) -> dict[str, Any]:
        """Engines, adapters and queues, as plain values."""
        status: dict[str, Any] = self._backend.call("status", timeout_s=CONTROL_TIMEOUT_S)
        return status

    def shutdown(self) -> None:
        """Ends the sampler and frees its devices, for every caller of it. Again: nothing."""
        self._backend.shutdown()


def _patience_s(timeout_s: float) -> float:
    """How long to wait for a router that keeps a deadline by itself, or refuses one that is none."""
    known = isinstance(timeout_s, (int, float)) and timeout_s > 0
    return (timeout_s if known else 0.0) + ANSWER_TIMEOUT_S


def _absolute(path: Any) -> str:
    """A directory as the router can find it: its process has another working directory."""
    if "://" in str(path):
        raise AdapterError(f"an adapter is loaded from a directory, got {str(path)!r}. Download it first.")
    return str(Path(path).expanduser().absolute())


def _each_prompt(parts: Iterator[SampleResponse], total: int, *, progress: bool) -> Iterator[SampleResponse]:
    """Responses to single prompts, out of responses to several, with a progress bar or without."""
    if progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        bar = Progress(
            TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("prompts"), TimeElapsedColumn()
        )
        with bar:
            task = bar.add_task("", total=total)
            for part in parts:
                for response in part:
                    bar.advance(task)
                    yield response
            bar.update(task, total=bar.tasks[0].completed)  # a template may have left prompts out
        return
    for part in parts:
        yield from part
