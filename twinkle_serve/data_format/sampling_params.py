"""Sampling parameters, with one strict meaning for every engine: a parameter is honoured or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from twinkle_serve.data_format import param_checks as checks
from twinkle_serve.data_format.param_checks import Check, integer, number, optional
from twinkle_serve.data_format.param_names import ALIASES, OTHER_NAMES
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.errors import SamplingParamsError, unknown_name

MIN_TOP_P = 1e-30
"""Smaller values are 0 in float32, in which engines compute: no token would be left."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 1e-30, 1e30
"""Beyond them, penalised logits are not finite in float32."""
MAX_TOP_K = 2**31 - 1
"""Engines hold it in 32 bits."""
MAX_NAMED_TOKENS = 128
"""Maximum number of `logprob_token_ids`, as in vLLM."""
MAX_PRIORITY = 2**31 - 1

LogprobsMode: TypeAlias = Literal["raw_logprobs", "processed_logprobs"]
SeedBy: TypeAlias = Literal["position", "content"]


UNSTRUCTURED = ("allowed_token_ids", "bad_words", "min_tokens", "ignore_eos", "stop_token_ids")
"""Parameters that structured_outputs may leave no token for, beside thinking_token_budget and token ids in `stop`."""


class Unset(Enum):
    """Default of arguments for which None has a meaning."""

    UNSET = "not given"


UNSET = Unset.UNSET


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling parameters of a request. Immutable; a plain dict of the same keys is accepted wherever this is.

    Raises:
        SamplingParamsError: an unknown name, or a value of the wrong type, that is not finite or is out of range, or
            two that contradict each other.
    """

    max_tokens: int | None = None
    """Maximum number of tokens per sample. None: up to the context length. 0: sample nothing, only score the prompt."""
    min_tokens: int = 0
    """Number of tokens before which neither an end-of-sequence token nor `stop` ends a sample."""
    temperature: float = 1.0
    """0 for greedy, else in [0.01, 100]."""
    top_k: int = -1
    """Sample from the k likeliest tokens; −1 or 0: from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together reach this probability, in [1e-30, 1]."""
    min_p: float = 0.0
    """Sample from tokens of at least this share of the likeliest one's probability, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the sample; in [1e-30, 1e30], 1 for
    none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the sample has; in [−2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the sample has it; in [−2, 2]."""
    logit_bias: Mapping[int, float] | None = None
    """Numbers in [−100, 100] to add to the logits of token ids."""
    allowed_token_ids: Sequence[int] | None = None
    """Token ids to sample from; None: all."""
    bad_words: Sequence[str] | None = None
    """Texts that a sample does not contain: the last token of each is excluded where its other tokens precede it. As
    vLLM does, a word is tokenised at the beginning of a text and, where that is one more token, after a space."""
    stop: str | list[str] | list[int] | tuple[str, ...] | tuple[int, ...] | None = None
    """Strings or token ids that end a sample. A stop string is cut from `decoded`; the tokens stay as sampled."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end a sample, beside `stop`."""
    ignore_eos: bool = False
    """Continue after the model's end-of-sequence tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop string in `decoded`."""
    skip_special_tokens: bool = False
    """Leave special tokens, such as the end of the turn, out of `decoded`."""
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    """What the text has to be: `{"json": schema}`, `{"regex": …}`, `{"choice": [...]}` or `{"grammar": …}`."""
    thinking_token_budget: int | None = None
    """Number of tokens after which a sample's thinking is ended by force; None: no limit. The engine has to know how
    the model marks its thinking: `engine_args.reasoning_config`."""
    seed: int | None = None
    """Seed of the request, in [0, 2**62). Each sample of each prompt has its own seed derived from it. None: samples
    have independent random streams and cannot be reproduced."""
    seed_by: SeedBy = "position"
    """What a prompt's seed is derived from besides `seed`. position: its index in the call. content: its token ids, and
    how many prompts before it in the call have the same, so that it does not depend on the others."""
    priority: int = 0
    """Prompts of a lower number leave the queue earlier; of equal ones, callers take turns. Nothing that runs is
    interrupted."""
    logprobs: int | None = 0
    """0: of each sampled token. k: also of the k likeliest tokens at each position. None: none."""
    logprob_token_ids: Sequence[int] | None = None
    """Up to 128 token ids whose logprobs are returned at each position too, after those of `logprobs`."""
    prompt_logprobs: int | None = None
    """0: of each prompt token. k: also of the k likeliest tokens at each position. None: none."""
    prompt_logprobs_start: int = 0
    """First position in the prompt whose logprobs are returned."""
    logprobs_mode: LogprobsMode | None = None
    """Distribution of the logprobs of samples, see `SampleResponse.logprobs_mode`. None: that of engine_args."""
    return_sampling_mask: bool = False
    """Return which tokens could be sampled at each position: those that top_k, top_p, min_p and the rest left."""
    num_samples: int = 1
    """Samples per prompt."""
    if TYPE_CHECKING:
        n: InitVar[int | None] = None
    else:
        n = property(lambda params: params.num_samples, doc="Another name of num_samples.")

    def __post_init__(self, n: int | None = None) -> None:  # noqa: RUF033  never given: construct() replaces it
        for name, default in DEFAULTS.items():
            value = getattr(self, name)
            if value is not default:
                object.__setattr__(self, name, CHECKS[name](name, value))
        if self.min_tokens:
            self._check_min_tokens()
        if self.structured_outputs is not None:
            self._check_structured()
        if self.logprob_token_ids is not None and self.logprobs is None:
            raise SamplingParamsError("logprobs=None asks for no logprobs, and logprob_token_ids for some. Drop one.")
        if self.prompt_logprobs_start and self.prompt_logprobs is None:
            raise SamplingParamsError(
                f"prompt_logprobs_start={self.prompt_logprobs_start} needs prompt_logprobs. Set it to 0 or more."
            )
        if self.return_sampling_mask:
            self._check_mask()

    def _check_min_tokens(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}. Lower it, or raise max_tokens."
            )

    def _check_structured(self) -> None:
        given = [name for name in UNSTRUCTURED if getattr(self, name) not in (None, False, 0, ())]
        given += ["thinking_token_budget"] if self.thinking_token_budget is not None else []
        given += ["stop"] if self.stop and not self.stop_strings else []
        if given:
            raise SamplingParamsError(
                f"{given[0]} contradicts structured_outputs: together they may leave no token to sample. Drop one."
            )

    def _check_mask(self) -> None:
        if self.greedy:
            raise SamplingParamsError(
                "return_sampling_mask needs a temperature above 0: a greedy sample has no distribution. Drop one."
            )
        if self.top_k <= 0 and self.top_p == 1 and not self.min_p and self.allowed_token_ids is None:
            raise SamplingParamsError(
                "return_sampling_mask needs top_k, top_p, min_p or allowed_token_ids: without them every token can be "
                "sampled. Set one, or leave it out."
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings of `stop`."""
        return tuple(item for item in self.stop or () if isinstance(item, str)) if self.stop else ()

    @property
    def all_stop_token_ids(self) -> tuple[int, ...]:
        """The token ids of `stop` and `stop_token_ids`."""
        ids = (item for item in self.stop or () if isinstance(item, int))
        return tuple(dict.fromkeys((*ids, *(self.stop_token_ids or ()))))

    @classmethod
    def of(
        cls,
        params: SamplingParams | Mapping[str, object] | None,
        num_samples: int | None = None,
        logprobs: int | Unset | None = UNSET,
        where: str = "",
    ) -> SamplingParams:
        """Converts `params` to SamplingParams and merges the `num_samples` and `logprobs` of a call.

        Args:
            params: SamplingParams, a dict of its fields (`max_new_tokens` is accepted for `max_tokens`, `n` for
                `num_samples`), or None for the defaults.
            num_samples: samples per prompt; None: as in `params`.
            logprobs: as the field; UNSET: as in `params`.
            where: begins an error's message about the type of `params`.

        Raises:
            SamplingParamsError: an unknown key, both spellings of one, an invalid value, or two different values.
        """
        if params is None:
            params = cls()
        elif isinstance(params, Mapping):
            params = cls(**_without_aliases(params))  # type: ignore[arg-type]  # the constructor validates them
        elif not isinstance(params, cls):
            raise SamplingParamsError(
                f"{where or 'sampling_params'} must be SamplingParams or a dict, got {type(params).__name__}. "
                "Parameters of an engine's own are not accepted."
            )
        given: dict[str, Any] = {}
        if num_samples is not None:
            given["num_samples"] = CHECKS["num_samples"]("num_samples", num_samples)
        if logprobs is not UNSET:
            given["logprobs"] = CHECKS["logprobs"]("logprobs", logprobs)
        for name, value in given.items():
            other = getattr(params, name)
            if other not in (value, DEFAULTS[name]):
                raise SamplingParamsError(
                    f"{name}={value} in the call contradicts {name}={other} in sampling_params. Give it once."
                )
        return replace(params, **given) if given else params

    @classmethod
    def from_dict(cls, params: Mapping[str, object]) -> SamplingParams:
        """Converts a dict, as in Twinkle: `SamplingParams.from_dict({"max_tokens": 16})`.

        Raises:
            SamplingParamsError: an unknown key, both spellings of one, or an invalid value.
        """
        return cls.of(params)


DEFAULTS: Final = {field.name: field.default for field in fields(SamplingParams)}


def _by_any_name(init: Callable[..., None]) -> Callable[..., None]:
    """Makes a constructor take aliases, and refuse unknown names with a hint rather than by a TypeError."""

    @functools.wraps(init)
    def construct(self: SamplingParams, **params: object) -> None:
        if not params.keys() <= DEFAULTS.keys():
            params = _without_aliases(params)
        init(self, **params)

    return construct


def with_defaults(
    params: SamplingParams | Mapping[str, object] | None, defaults: Mapping[str, object]
) -> SamplingParams | Mapping[str, object] | None:
    """Returns a call's parameters with those that it leaves out; a SamplingParams object leaves out nothing."""
    if not defaults or not (params is None or isinstance(params, Mapping)):
        return params
    return _without_aliases(defaults) | _without_aliases(params or {})


def _without_aliases(params: Mapping[str, object]) -> dict[str, object]:
    clean: dict[str, object] = {}
    for key, value in params.items():
        name = ALIASES.get(key, key)
        if name not in DEFAULTS:
            raise SamplingParamsError(_unknown(key))
        if name != key and params.get(name, DEFAULTS[name]) != DEFAULTS[name]:
            raise SamplingParamsError(f"{name} is given twice, as {name} and as {key}. Give it once.")
        if name != key or name not in clean:  # a default beside another name of it means nothing
            clean[name] = value
    return clean


def _unknown(name: object) -> str:
    known = {*DEFAULTS, *ALIASES}
    if (other := OTHER_NAMES.get(str(name))) is not None:
        return f"unknown sampling parameter {name!r}, did you mean {other}? Known: {', '.join(sorted(known))}."
    return unknown_name("sampling parameter", name, known) + "."


SamplingParams.__init__ = _by_any_name(SamplingParams.__init__)  # type: ignore[method-assign]


def _stop_as_given(name: str, value: Any) -> Any:
    """Returns `stop` in the caller's type, but not the caller's own list."""
    stops = checks.stop(name, value)
    return None if value is None else list(stops) if isinstance(value, list) else stops


def _named_tokens(name: str, value: Any) -> tuple[int, ...]:
    ids = checks.token_ids(name, value)
    if len(ids) > MAX_NAMED_TOKENS:
        raise SamplingParamsError(f"{name} must hold at most {MAX_NAMED_TOKENS} token ids, got {len(ids)}.")
    return ids


_penalty = number(-checks.MAX_PENALTY, checks.MAX_PENALTY)
CHECKS: Final[dict[str, Check]] = {
    "max_tokens": integer(0),
    "min_tokens": integer(0),
    "temperature": checks.temperature,
    "top_k": integer(-1, MAX_TOP_K),
    "top_p": number(MIN_TOP_P, 1, " 1 considers every token; for the likeliest one, set temperature=0 or top_k=1."),
    "min_p": number(0, 1, " 0 considers every token."),
    "repetition_penalty": number(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY, " 1 is no penalty."),
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "logit_bias": checks.logit_bias,
    "allowed_token_ids": checks.token_ids,
    "bad_words": checks.words,
    "stop": _stop_as_given,
    "stop_token_ids": checks.stop_token_ids,
    "ignore_eos": checks.boolean,
    "include_stop_str_in_output": checks.boolean,
    "skip_special_tokens": checks.boolean,
    "structured_outputs": lambda name, value: StructuredOutputs.of(value),
    "thinking_token_budget": integer(0, MAX_TOP_K),
    "seed": integer(0, 2**62 - 1),
    "seed_by": checks.choice(*get_args(SeedBy)),
    "priority": integer(-MAX_PRIORITY, MAX_PRIORITY),
    "logprobs": optional(integer(0)),
    "logprob_token_ids": _named_tokens,
    "prompt_logprobs": integer(0),
    "prompt_logprobs_start": integer(0),
    "logprobs_mode": checks.choice(*get_args(LogprobsMode)),
    "return_sampling_mask": checks.boolean,
    "num_samples": integer(1),
}
"""Check of each parameter whose value is not the default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingParams:
    """The parameters of a group that its engine reads; each group has its own count and seed."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = False
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: int | None = None
    logprobs: int | None = 0
    logprob_token_ids: Sequence[int] = ()
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    logprobs_mode: LogprobsMode | None = None
    return_sampling_mask: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def logprobs_width(self) -> int:
        """Number of logprobs at each position of a sample; 0 for none."""
        return 0 if self.logprobs is None else 1 + self.logprobs + len(self.logprob_token_ids)

    @classmethod
    def of(cls, params: SamplingParams) -> DecodingParams:
        changed = {name: value for name in _SHARED if (value := getattr(params, name)) is not DEFAULTS[name]}
        if params.logprob_token_ids:
            changed["logprob_token_ids"] = params.logprob_token_ids
        if params.stop or params.stop_token_ids:
            changed |= {"stop_strings": params.stop_strings, "stop_token_ids": params.all_stop_token_ids}
        return cls(**changed)

    def __reduce__(self) -> tuple[Callable[..., DecodingParams], tuple[dict[str, Any]]]:
        """Pickles what differs from the defaults: every group of a call has these."""
        changed = {name: value for name, default in _DECODING.items() if (value := getattr(self, name)) is not default}
        return _decoding_params, (changed,)


def _decoding_params(changed: dict[str, Any]) -> DecodingParams:
    return DecodingParams(**changed)


_DECODING: Final = {field.name: field.default for field in fields(DecodingParams)}
_SHARED: Final = tuple(_DECODING.keys() & DEFAULTS.keys() - {"stop_token_ids", "logprob_token_ids"})
