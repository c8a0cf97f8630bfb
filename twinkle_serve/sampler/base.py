"""The Sampler interface, and the sampler whose engines run."""

from __future__ import annotations

import contextlib
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Unpack, cast

from twinkle_serve.adapters import absolute_directory, of_memory, pack_adapter
from twinkle_serve.conventions import follows_twinkle
from twinkle_serve.data_format import SampleResponse, SamplingParams
from twinkle_serve.data_format.adapters import AdapterFiles
from twinkle_serve.data_format.response_list import as_called, as_raised
from twinkle_serve.data_format.sample_request import (
    Inputs,
    SampleOptions,
    SampleRequest,
    SamplingParamsLike,
    StreamOptions,
    TemplateChoice,
    TextOptions,
    UpdateOptions,
    check_options,
    copied_params,
)
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.errors import AdapterError, DeadlineError, RequestError, UnsupportedError
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.controls import EngineControls
from twinkle_serve.sampler.encoding import EncodingSampler, LocalTemplate
from twinkle_serve.sampler.progress import progress_of
from twinkle_serve.sampler.rollouts import AsyncRollouts, Rollouts
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sampler.session import SessionCalls
from twinkle_serve.sampler.token_calls import TokenCalls
from twinkle_serve.sampler.twinkle_calls import TwinkleCalls
from twinkle_serve.sampler.verification import Verification, verify
from twinkle_serve.tasks import Call, deferred
from twinkle_serve.template.packing import pack_template
from twinkle_serve.tensors import Tensors
from twinkle_serve.traces import current_traceparent
from twinkle_serve.validation import flag

if TYPE_CHECKING:
    from peft import LoraConfig

    from twinkle_serve.template import Template


class Sampler(EncodingSampler, ABC):
    """Generates a model's output. Source of the interface: Twinkle's Sampler. A subclass implements `sample`."""

    @abstractmethod
    def sample(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        *,
        num_samples: int | None = None,
    ) -> SampleResponse:
        """Samples each input `num_samples` times."""

    def add_adapter_to_model(
        self,
        adapter_name: str,
        config_or_dir: LoraConfig | str | os.PathLike[str],
        *,
        state_dict: Tensors | None = None,
    ) -> str:
        """Adds a LoRA adapter. Returns its version."""
        raise UnsupportedError(f"{type(self).__name__} has no adapters.")


class RunningSampler(EngineControls, TokenCalls, SessionCalls, Sampler, TwinkleCalls):
    """A sampler whose engines run, in this process or as a service.

    Guarantees:
        A call returns every sample that it asked for, or raises a TwinkleServeError; the next call works.
        Inputs are copied when a call is made, and never changed.
    """

    def __init__(self, client: RouterClient) -> None:
        """
        Args:
            client: reaches the router of the engines.
        """
        super().__init__(client)
        self._template: TemplateChoice = None
        self._local_template = LocalTemplate()
        self._default_adapter = ""

    # -- sampling --------------------------------------------------------------------------------

    def sample(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        progress: bool = False,
        **options: Unpack[SampleOptions],
    ) -> SampleResponse:
        """Samples each input `num_samples` times. Blocks; in async code use `sample_async`.

        Args:
            inputs: a Trajectory or InputFeature, or a list of either kind. Values may be lists, numpy or torch.
            sampling_params: SamplingParams or a dict of the same keys.
            adapter_name: LoRA adapter to sample with, `name` for its newest version or `name@version`; "" is the base
                model.
            adapter_path: directory of a LoRA adapter instead, on the router's node; read again when its files change.
            progress: show a progress bar on the terminal, with tokens per second and the time that is left.

        Keyword Args:
            num_samples: samples of each prompt; None takes it from sampling_params, where it is 1.
            logprobs: as in sampling_params, which has 0: of each sampled token.
            use_base_model: the base model, said explicitly; refused together with an adapter.
            continue_final_message: whether the assistant's message that ends a conversation is continued. True: of
                every input that has messages. False: such a conversation is a PromptError. None: as the template says.
            timeout_s: deadline of the call in seconds, queueing included; None: the config's request_timeout_s.
            sample_timeout_s: seconds that each sample may take on its engine, waiting and pauses included; then it
                ends, with stop_reason abort.
            min_groups: return once this many prompts are complete and cancel the others: `prompt_indices` lists the
                complete ones. None: wait for all.
            engine: name of the only engine that may sample the call, as in `status()["engines"]`: to compare engines.
                The call waits for it, past the queue, also while it is being replaced. "": any engine.
            track: the track whose engines sample the call, of the config's `tracks`, also after a failover. Without an
                engine of it, the call waits for one. "": the first track, or that of `engine`.

        Returns:
            A response whose `sequences` are flat and prompt-major. Iterating over it yields one response per prompt.

        Raises:
            RequestError: the call cannot be served: SamplingParamsError, PromptError, AdapterError.
            PoisonPromptError: a prompt ended several engines.
            QueueFullError: the queue is full; `retry_after_s` says when there may be room.
            DeadlineError: it took longer than `timeout_s`; `response` of the error has the prompts that were complete.
            EngineError: engines failed.
            ServiceError: the service's router failed or cannot be reached.
        """
        shows = flag("progress", progress)
        request = self._request(inputs, sampling_params, adapter_name, adapter_path, options)
        try:
            with progress_of(self._client, request) if shows else contextlib.nullcontext():
                return as_called(self._client.loop.call(self._client.run(request)))
        except DeadlineError as error:
            raise as_raised(error) from None

    def sample_async(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[SampleOptions],
    ) -> Coroutine[Any, Any, SampleResponse]:
        """As `sample`, for async code: an async actor, or `asyncio.run`.

        Inputs are copied by the call itself; it is sent, and errors are raised, when it is awaited.
        """

        def run() -> Call[SampleResponse]:
            return self._client.run(self._request(inputs, sampling_params, adapter_name, adapter_path, options))

        return self._response(deferred(run))

    async def _response(self, call: Call[SampleResponse]) -> SampleResponse:
        try:
            return as_called(await self._client.loop.call_async(call))
        except DeadlineError as error:
            raise as_raised(error) from None

    def sample_iter(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        progress: bool = False,
        **options: Unpack[SampleOptions],
    ) -> Rollouts:
        """Yields the response to each prompt as it finishes, in any order; `prompt_index` identifies it.

        The call is sent at once; errors of the router are raised by the first `next`. Arguments and errors as of
        `sample`, but a DeadlineError has no response. Prompts can be cancelled while it runs.

        Args:
            progress: show a progress bar on the terminal.
        """
        request = self._request(inputs, sampling_params, adapter_name, adapter_path, options)
        flag("progress", progress)
        parts = self._client.loop.iterate(self._client.run_iter(request))
        return Rollouts(self._client, request, parts, progress=progress)

    def sample_iter_async(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[SampleOptions],
    ) -> AsyncRollouts:
        """As `sample_iter`, for async code. The call is sent by the first `anext`."""
        request = self._request(inputs, sampling_params, adapter_name, adapter_path, options)
        parts = self._client.loop.iterate_async(self._client.run_iter(request))
        return AsyncRollouts(self._client, request, parts)

    def sample_updates(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[UpdateOptions],
    ) -> Iterator[UpdatesItem]:
        """As `sample_iter`, and yields new tokens, logprobs and text of all samples while they run.

        The items are a CallBegun, lists of SampleUpdate, and the responses to prompts as they finish. The updates of a
        sample, joined, are the sample; the last one has its stop reason. The call is sent at once. Closing the iterator
        aborts the call. It raises as `sample_iter`, and besides:

        Keyword Args:
            update_text: the text of updates: `decoded`, as the sampling parameters ask for it; `whole`, with special
                tokens, as `CallBegun.parser` takes it.

        Raises:
            EngineDeadError: the engine of a sample ended after tokens of it were yielded, and the sample is neither
                resumable nor seeded nor greedy.
        """
        request = self._request(inputs, sampling_params, adapter_name, adapter_path, options, UpdateOptions)
        return self._client.loop.iterate(self._client.run_updates(request))

    def sample_updates_async(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[UpdateOptions],
    ) -> AsyncIterator[UpdatesItem]:
        """As `sample_updates`, for async code. The call is sent by the first `anext`."""
        request = self._request(inputs, sampling_params, adapter_name, adapter_path, options, UpdateOptions)
        return self._client.loop.iterate_async(self._client.run_updates(request))

    def sample_stream(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[TextOptions],
    ) -> Iterator[tuple[str, StopReason | None]]:
        """Samples one prompt once and yields (delta_text, finish_reason) as the text arrives.

        No delta splits a character; together they are the sample's `decoded`. finish_reason is None until the last.
        Closing the iterator aborts the sample.

        Keyword Args:
            use_base_model, continue_final_message, timeout_s, track: as in `sample`.
            skip_special_tokens: as in sampling_params.

        Raises:
            RequestError: as `sample`; or more than one prompt or sample.
        """
        request = self._request(inputs, sampling_params, adapter_name, adapter_path, options, TextOptions)
        return self._client.loop.iterate(self._client.run_stream(request))

    def sample_stream_async(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None = None,
        adapter_name: str = "",
        adapter_path: str | None = None,
        **options: Unpack[TextOptions],
    ) -> AsyncIterator[tuple[str, StopReason | None]]:
        """As `sample_stream`, for async code."""
        request = self._request(inputs, sampling_params, adapter_name, adapter_path, options, TextOptions)
        return self._client.loop.iterate_async(self._client.run_stream(request))

    def _request(
        self,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None,
        adapter_name: str,
        adapter_path: str | None,
        options: StreamOptions,
        allowed: type[StreamOptions] = SampleOptions,
    ) -> SampleRequest:
        if adapter_name is None or (isinstance(adapter_name, str) and not adapter_name):
            adapter_name = "" if adapter_path or options.get("use_base_model") else self._default_adapter
        if allowed is TextOptions and follows_twinkle():
            options = cast(StreamOptions, {"skip_special_tokens": True, **options})
        request = SampleRequest(
            inputs=inputs,
            sampling_params=copied_params(sampling_params, named_tokens=not follows_twinkle()),
            adapter_name=adapter_name,
            adapter_path=None if adapter_path is None or adapter_path == "" else absolute_directory(adapter_path),
            template=self._template,
            request_id=uuid.uuid4().hex,
            traceparent=current_traceparent(),
            **check_options(options, allowed),
        )
        return self._client.prepare(request)

    # -- scoring ---------------------------------------------------------------------------------

    def score(
        self,
        inputs: Inputs,
        adapter_name: str = "",
        adapter_path: str | None = None,
        *,
        top_logprobs: int = 0,
        use_base_model: bool = False,
        timeout_s: float | None = None,
        track: str = "",
    ) -> SampleResponse:
        """Returns the logprob of every token of given sequences; samples nothing.

        Args:
            inputs: as of `sample`. Messages are scored as they stand, without a turn opened for the assistant.
            top_logprobs: how many of the likeliest tokens to return at each position too.
            track: as of `sample`.

        Returns:
            One response an input: `prompt_token_ids`, `prompt_logprobs` (nats, None at position 0) and
            `topk_prompt_logprobs`.

        Raises:
            PromptError: a sequence is longer than the engine can score: its context, less one for vllm.
        """
        params = SamplingParams(max_tokens=0, logprobs=None, prompt_logprobs=top_logprobs)
        return self.sample(
            inputs, params, adapter_name, adapter_path, use_base_model=use_base_model, timeout_s=timeout_s, track=track
        )

    def verify(
        self,
        response: SampleResponse,
        *,
        against: RunningSampler,
        adapter_name: str | None = None,
        worst: int = 10,
        track: str = "",
    ) -> Verification:
        """Scores a response's samples on a second sampler, and compares logprobs token by token.

        Args:
            against: the second sampler, of the same model. A torch engine in float32 is a good one.
            adapter_name: adapter to score with there. None: against this sampler itself, the version that each sample
                names; against another one, the adapter of the same name there.
            worst: number of tokens in `worst_tokens`, those with the largest differences.
            track: the track of the second sampler that scores them; "": its first one.

        Raises:
            RequestError: the response has no logprobs, or not of the model's own distribution; or its samples are of
                two versions of an adapter, or of the model's own weights, and the other sampler has one.
            AdapterError: the other sampler has no such adapter, or has dropped that version.
        """
        if not isinstance(against, RunningSampler):
            raise RequestError(f"against must be a sampler, got {type(against).__name__}.")
        same_service = against._client is self._client
        templates = (against._find_template, self._find_template)
        return verify(
            response, against, adapter_name, worst, track=track, same_service=same_service, templates=templates
        )

    # -- adapters and templates ------------------------------------------------------------------

    def add_adapter_to_model(
        self,
        adapter_name: str,
        config_or_dir: LoraConfig | AdapterFiles | str | os.PathLike[str],
        *,
        state_dict: Tensors | None = None,
    ) -> str:
        """Loads a LoRA adapter on every engine, then makes its name mean it. Returns `name@version`.

        Running calls, and calls admitted with the name before, keep the version that it meant then.

        Args:
            config_or_dir: a directory as peft's save_pretrained writes it, on the service's nodes; peft's LoraConfig,
                with its tensors in `state_dict`; or the files of such a directory, as `read_adapter` reads them here.
            state_dict: tensors of torch on any device, sharded ones (DTensor) included, or of numpy, named as in peft's
                get_peft_model_state_dict or in the model's own state_dict. They are copied before the call returns.

        Raises:
            AdapterError: unreadable, incomplete, not of this model, a rank above the limit, other tensors that are not
                the model's own, or LoRA is switched off.
            StoreError: the service's store cannot be reached or written.
            DeadlineError: the engines did not load it within the config's startup_timeout_s.
                After each, the name keeps its meaning.
        """
        source: AdapterFiles | str
        saved = isinstance(config_or_dir, (str, os.PathLike, AdapterFiles))
        if isinstance(config_or_dir, (str, os.PathLike, AdapterFiles)):
            if state_dict is not None:
                raise AdapterError("state_dict comes with a LoraConfig; the directory has weights of its own.")
            given = config_or_dir
            source = given if isinstance(given, AdapterFiles) else absolute_directory(given)
        else:
            source = pack_adapter(config_or_dir, state_dict)
        try:
            return self._control(RouterAPI.add_adapter, adapter_name, source)
        except AdapterError as error:
            raise (error if saved else of_memory(error)) from error.__cause__

    def remove_adapter(self, adapter_name: str) -> None:
        """Removes an adapter name; calls that were admitted with it finish on it.

        Raises:
            AdapterError: no such adapter.
        """
        self._control(RouterAPI.remove_adapter, adapter_name)

    def set_template(self, template_cls: Template | type[Template] | str, **kwargs: object) -> None:
        """Sets how calls of this sampler object turn messages into tokens; other callers are not affected.

        Args:
            template_cls: a registered name, a Template class or a Template.
            kwargs: arguments of the class; `model_id` names another model's tokenizer.

        Raises:
            TemplateError: no such template, or invalid arguments.
        """
        choice = pack_template(template_cls, kwargs)
        self._control(RouterAPI.check_template, choice)
        self._template, self._local_template = choice, LocalTemplate()

    @property
    def template(self) -> Template:
        """The template of this sampler object's calls, in this process: the one that was set, or the model's own.

        It is built on first use, and needs the files of the model's tokenizer here. Setting it is `set_template`.

        Raises:
            ModelNotFoundError: the model's tokenizer cannot be found or loaded here.
        """
        return self._local_template.get(self._template, self.status)

    @template.setter
    def template(self, template: Template) -> None:
        self.set_template(template)

    def _find_template(self) -> Template | None:
        return self._local_template.find(self._template, self.status)

    @property
    def default_adapter(self) -> str:
        """Name of the adapter of calls that name none; "" is the base model.

        It is of this sampler object alone. `use_base_model=True` is still the base model, and each sample's `adapter`
        says which version sampled it. A name that no adapter has fails the calls, with AdapterError.
        """
        return self._default_adapter

    @default_adapter.setter
    def default_adapter(self, name: str) -> None:
        if not isinstance(name, str):
            raise AdapterError(f"default_adapter must be the name of an adapter, got {name!r}.")
        self._default_adapter = name
