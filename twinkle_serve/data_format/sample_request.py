"""A call that samples, as it travels from the caller to the router."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, TypeVar, cast, get_type_hints

from twinkle_serve.data_format.inputs import PackedInputs, as_list
from twinkle_serve.data_format.param_names import ALIASES
from twinkle_serve.data_format.sample_updates import UPDATE_TEXTS, UpdateText
from twinkle_serve.data_format.sampling_params import UNSET, SamplingParams, Unset, with_defaults
from twinkle_serve.errors import AdapterError, RequestError, SamplingParamsError, unknown_name
from twinkle_serve.validation import flag, one_of, seconds

Inputs: TypeAlias = Any
"""A Trajectory, an InputFeature, a list of either kind, or PackedInputs; validated where prompts are encoded."""

SamplingParamsLike: TypeAlias = SamplingParams | Mapping[str, Any] | Sequence[SamplingParams | Mapping[str, Any]]
"""SamplingParams or a dict of the same keys, for all inputs; or a list with one of them for each."""

SHORT_BYTES = 2**12
"""Size of the inputs of a short call: about 1,000 tokens, as ids or text."""

TemplateChoice: TypeAlias = str | bytes | None
"""A registered name, the result of `pack_template`, or None for the config's template."""


class StreamOptions(TypedDict, total=False):
    """Keywords of `sample_stream`."""

    use_base_model: bool
    """Sample with the base model; refused together with an adapter."""
    timeout_s: float | None
    """Deadline of the call in seconds, queueing included; None: the config's request_timeout_s."""
    continue_final_message: bool | None
    """Whether the sample continues the assistant's message that ends the conversation; None: as the template says."""
    track: str
    """Track whose engines sample the call, of `status()["tracks"]`. "": the first one, or that of `engine`."""


class TextOptions(StreamOptions, total=False):
    """Keywords of `sample_stream` that no other call has."""

    skip_special_tokens: bool
    """Leave special tokens, such as the end of the turn, out of the text."""


class SampleOptions(StreamOptions, total=False):
    """Keywords of `sample`, `sample_async`, `sample_iter` and `sample_iter_async`."""

    num_samples: int | None
    """Samples of each prompt; None: as in sampling_params, whose default is 1."""
    logprobs: int | Unset | None
    """As in sampling_params, whose default is 0: of each sampled token."""
    sample_timeout_s: float | None
    """Seconds that each sample may take on its engine, waiting and pauses included; then it ends, with stop_reason
    abort."""
    min_groups: int | None
    """Return once this many prompts are complete and cancel the others: `prompt_indices` lists the complete ones.
    None: wait for all."""
    engine: str
    """Name of the only engine that may sample the call, as in `status()["engines"]`: to compare engines. The call waits
    for it, past the queue, also while it is being replaced. "": any engine."""


class UpdateOptions(SampleOptions, total=False):
    """Keywords of `sample_updates` and `sample_updates_async`."""

    update_text: UpdateText
    """The text of updates: `decoded`, as the sampling parameters ask for it; `whole`, with special tokens."""


class HandleOptions(UpdateOptions, TextOptions, total=False):
    """Keywords of the router's methods, by handle: the other fields of `SampleRequest`."""

    template: TemplateChoice
    request_id: str
    caller: str
    lease_s: float | None
    done: Sequence[int]
    cancelled: Sequence[int] | None
    return_inputs: bool
    traceparent: str


class EncodeOptions(TypedDict, total=False):
    """Keywords of `RouterAPI.encode` and `RouterAPI.count_tokens`."""

    template: TemplateChoice
    """As in a SampleRequest."""
    continue_final_message: bool | None
    """As in a SampleRequest."""
    add_generation_prompt: bool
    """Whether to end at the beginning of the assistant's turn, or after the last message."""


IGNORED_OPTIONS: set[str] = set()
"""Keywords of other samplers that have no effect here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """A call that samples; fields as in `RunningSampler.sample`."""

    inputs: Inputs
    sampling_params: SamplingParamsLike | None = None
    adapter_name: str = ""
    adapter_path: str | None = None
    num_samples: int | None = None
    logprobs: int | Unset | None = UNSET
    use_base_model: bool = False
    continue_final_message: bool | None = None
    template: TemplateChoice = None
    timeout_s: float | None = None
    sample_timeout_s: float | None = None
    min_groups: int | None = None
    engine: str = ""
    track: str = ""
    skip_special_tokens: bool = False
    """As a keyword of `sample_stream`; of `run_updates` as well."""
    update_text: UpdateText = "decoded"
    """As a keyword of `sample_updates`."""
    updates: bool = False
    """Whether new tokens are reported while samples run; set by `RouterAPI.run_updates`."""
    request_id: str = ""
    """Id by which the caller cancels the call. It replaces a running call with the same id."""
    caller: str = ""
    """Id of the caller; callers take turns."""
    lease_s: float | None = None
    """The call is given up when `renew` has not been called for so long; None: never."""
    done: Sequence[int] = ()
    """Indices of the inputs that the caller already has responses for, from another router."""
    cancelled: Sequence[int] | None = ()
    """Indices of the inputs that the caller has cancelled; None: all that are not done."""
    return_inputs: bool = True
    """Whether responses hold the inputs; a caller that keeps them spares the router the copy."""
    traceparent: str = ""
    """W3C's id of the span that the call is part of; an invalid one is ignored."""

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        sampling_params: SamplingParamsLike | None,
        adapter_name: str,
        adapter_path: str | None,
        options: HandleOptions,
    ) -> SampleRequest:
        """Creates a request from the arguments of a call."""
        return cls(
            inputs=inputs,
            sampling_params=sampling_params,
            adapter_name=adapter_name,
            adapter_path=adapter_path,
            **options,
        )

    @property
    def input_count(self) -> int:
        """Number of inputs; 0 where `inputs` is not valid."""
        if isinstance(self.inputs, PackedInputs):
            return len(self.inputs)
        return len(as_list(self.inputs) or ())

    @property
    def is_short(self) -> bool:
        """Whether its inputs are read and encoded in about a millisecond."""
        return isinstance(self.inputs, PackedInputs) and self.inputs.size_bytes <= SHORT_BYTES

    def params_of_inputs(self, defaults: Mapping[str, Any]) -> list[SamplingParams]:
        """Returns the sampling parameters of each input, in order; those of all inputs are one object.

        Args:
            defaults: for calls without parameters, and for what their dicts leave out.

        Raises:
            SamplingParamsError: invalid ones, a list of another length than the inputs, or two that cannot be in one
                call.
        """
        given, count = self.sampling_params, self.input_count
        # The call's own arguments come before the defaults, and may not contradict its parameters.
        own = {"num_samples": self.num_samples is not None, "logprobs": self.logprobs is not UNSET}
        defaults = {name: value for name, value in defaults.items() if not own.get(ALIASES.get(name, name))}
        if not isinstance(given, (list, tuple)):
            params = with_defaults(cast(Any, given), defaults)
            return [SamplingParams.of(params, self.num_samples, self.logprobs)] * count
        if len(given) != count:
            raise SamplingParamsError(
                f"sampling_params is a list of {len(given)}, and the call has {count} inputs. Give one for each input, "
                "or a single one for all."
            )
        each = [
            SamplingParams.of(with_defaults(params, defaults), self.num_samples, self.logprobs, f"sampling_params[{i}]")
            for i, params in enumerate(given)
        ]
        if len(modes := {params.logprobs_mode for params in each}) > 1:
            raise SamplingParamsError(
                f"logprobs_mode must be the same for all inputs of a call, got {' and '.join(map(repr, modes))}. Send "
                "a call for each."
            )
        if len({params.max_tokens == 0 for params in each}) > 1:
            raise SamplingParamsError(
                "max_tokens is 0 for some inputs of the call and more for others: a prompt that is only scored is "
                "rendered differently. Send a call for each kind."
            )
        return each

    def check_limits(self, prompts: int) -> None:
        """Validates sample_timeout_s, skip_special_tokens, update_text, and min_groups against the number of prompts.

        Raises:
            RequestError: an invalid limit.
        """
        if self.sample_timeout_s is not None:
            seconds("sample_timeout_s", self.sample_timeout_s)
        if not isinstance(self.skip_special_tokens, bool):
            raise RequestError(f"skip_special_tokens must be true or false, got {self.skip_special_tokens!r}.")
        one_of("update_text", self.update_text, UPDATE_TEXTS)
        groups = self.min_groups
        if groups is not None and (
            isinstance(groups, bool) or not isinstance(groups, int) or not 1 <= groups <= prompts
        ):
            raise RequestError(f"min_groups must be a number from 1 to the call's {prompts} prompts, got {groups!r}.")

    def adapter(self) -> tuple[str, str]:
        """Returns (name, path) of the adapter, of which at most one is not empty.

        Raises:
            AdapterError: more than one of adapter_name, adapter_path and use_base_model is given.
        """
        for key, value in (("adapter_name", self.adapter_name), ("adapter_path", self.adapter_path)):
            if not isinstance(value, str) and not (key == "adapter_path" and value is None):
                raise AdapterError(f"{key} must be a string, got {value!r}.")
        flag("use_base_model", self.use_base_model)
        choices = {
            "adapter_name": self.adapter_name,
            "adapter_path": self.adapter_path,
            "use_base_model": self.use_base_model,
        }
        given = {key: value for key, value in choices.items() if value}
        if len(given) > 1:
            both = " and ".join(f"{key}={value!r}" for key, value in given.items())
            raise AdapterError(f"{both} contradict each other. Give one of them.")
        return self.adapter_name, self.adapter_path or ""


def copied_params(params: SamplingParamsLike | None, *, named_tokens: bool = True) -> SamplingParamsLike | None:
    """Copies the sampling parameters of a call, which the caller may change while it runs.

    Args:
        named_tokens: whether logprob_token_ids may be among them.

    Raises:
        SamplingParamsError: they cannot be copied, or name tokens.
    """
    try:
        copied = copy.deepcopy(params)
    except Exception as error:
        raise SamplingParamsError(
            f"sampling_params of type {type(params).__name__} cannot be copied: {error}. Give SamplingParams, a dict, "
            "or a list of these, with plain values."
        ) from error
    each = copied if isinstance(copied, (list, tuple)) else [copied]
    if not named_tokens and any(_value(item, "logprob_token_ids") is not None for item in each):
        raise SamplingParamsError(
            "logprob_token_ids has no place in Twinkle's lists of logprobs. Leave it out, or import twinkle_serve."
        )
    return copied


def _value(params: object, name: str) -> object:
    return params.get(name) if isinstance(params, Mapping) else getattr(params, name, None)


OptionsT = TypeVar("OptionsT", bound=StreamOptions)


def check_options(options: OptionsT, allowed: type[OptionsT]) -> OptionsT:
    """Returns the keywords of a call without the ignored ones.

    Raises:
        TypeError: a keyword that the call does not take.
    """
    kept = {name: value for name, value in options.items() if name not in IGNORED_OPTIONS}
    known = _names(cast(Hashable, allowed))
    for name in kept:
        if name not in known:
            raise TypeError(f"unexpected keyword argument: {unknown_name('option', name, known)}")
    return cast(OptionsT, kept)


@functools.cache  # reading the types takes a third of a millisecond
def _names(options: Hashable) -> tuple[str, ...]:
    return tuple(get_type_hints(options))
