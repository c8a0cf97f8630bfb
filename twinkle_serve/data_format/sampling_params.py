"""Sampling parameters, with one strict meaning for every engine: a parameter is honoured or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import partial

from twinkle_serve.errors import SamplingParamsError, unknown_name
from twinkle_serve.validation import finite_number, whole_number

MAX_TEMPERATURE = 2.0
MIN_TEMPERATURE = 0.01
"""Below it, logits / temperature overflows. vLLM would raise the value silently, so it is refused."""


MIN_TOP_P = 1e-30
"""Smaller values are 0 in float32, in which engines compute: no token would be left."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 1e-30, 1e30
"""Beyond them, penalised logits are not finite in float32."""
MAX_TOP_K = 2**31 - 1
"""Engines hold it in 32 bits."""


class Unset(Enum):
    """Default of arguments for which None has a meaning."""

    UNSET = "not given"


UNSET = Unset.UNSET

ALIASES = {"max_new_tokens": "max_tokens"}


_whole = partial(whole_number, error=SamplingParamsError)
_real = partial(finite_number, error=SamplingParamsError)


def _stop(value: object) -> tuple[str, ...] | tuple[int, ...]:
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise SamplingParamsError(
            f"stop must be a string, a list of strings or a list of token ids, got {value!r} ({type(value).__name__})."
        )
    if all(isinstance(item, str) for item in items):
        if not all(items):
            raise SamplingParamsError(f"stop must not hold an empty string, which stops at once, got {value!r}.")
        try:
            "".join(items).encode()
        except UnicodeEncodeError:
            raise SamplingParamsError(f"stop must be text, got half of a surrogate pair: {value!r}.") from None
        return tuple(items)
    if any(isinstance(item, str) for item in items):
        raise SamplingParamsError(f"stop must be all strings or all token ids, got both: {value!r}. Choose one kind.")
    return tuple(_whole("stop", item, 0) for item in items)


class _DerivedParams:
    """Properties of SamplingParams and DecodingParams."""

    __slots__ = ()

    temperature: float
    stop: Sequence[str] | Sequence[int] | None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings of `stop`."""
        return tuple(item for item in self.stop or () if isinstance(item, str))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The token ids of `stop`."""
        return tuple(item for item in self.stop or () if isinstance(item, int))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams(_DerivedParams):
    """Sampling parameters of a request. Immutable; a plain dict of the same keys is accepted wherever this is.

    Raises:
        SamplingParamsError: a value has the wrong type, is not finite or is out of range.
    """

    max_tokens: int | None = None
    """Maximum number of tokens per sample. None: up to the context length. 0: sample nothing, only score the prompt."""
    temperature: float = 1.0
    """0 for greedy, else in [0.01, 2]."""
    top_k: int = -1
    """Sample from the k likeliest tokens; −1 or 0: from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together reach this probability, in [1e-30, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the sample; in [1e-30, 1e30], 1 for
    none."""
    seed: int | None = None
    """Seed of the request, in [0, 2**62). Each sample of each prompt has its own seed derived from it. None: samples
    have independent random streams and cannot be reproduced."""
    stop: str | list[str] | list[int] | tuple[str, ...] | tuple[int, ...] | None = None
    """Strings or token ids that end a sample. A stop string is cut from `decoded`; the tokens stay as sampled."""
    ignore_eos: bool = False
    """Continue after the model's end-of-sequence tokens."""
    logprobs: int | None = 0
    """0: of each sampled token. k: also of the k likeliest tokens at each position. None: none."""
    prompt_logprobs: int | None = None
    """0: of each prompt token. k: also of the k likeliest tokens at each position. None: none."""
    num_samples: int = 1
    """Samples per prompt."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            self._put("max_tokens", _whole("max_tokens", self.max_tokens, 0))
        temperature = _real("temperature", self.temperature)
        if temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
            raise SamplingParamsError(
                f"temperature must be 0 (greedy) or in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}], got {temperature}."
            )
        self._put("temperature", temperature)
        self._put("top_k", _whole("top_k", self.top_k, -1, MAX_TOP_K))
        self._put("top_p", _real("top_p", self.top_p))
        if not MIN_TOP_P <= self.top_p <= 1:
            raise SamplingParamsError(
                f"top_p must be in [{MIN_TOP_P}, 1], got {self.top_p}. 1 considers every token; for the likeliest one, "
                "set temperature=0 or top_k=1."
            )
        self._put("repetition_penalty", _real("repetition_penalty", self.repetition_penalty))
        if not MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise SamplingParamsError(
                f"repetition_penalty must be in [{MIN_REPETITION_PENALTY}, {MAX_REPETITION_PENALTY}], got "
                f"{self.repetition_penalty}. 1 is no penalty."
            )
        if self.seed is not None:
            self._put("seed", _whole("seed", self.seed, 0, 2**62 - 1))
        stops = _stop(self.stop)  # of the caller's type, but not the caller's own list
        self._put("stop", None if self.stop is None else list(stops) if isinstance(self.stop, list) else stops)
        if not isinstance(self.ignore_eos, bool):
            raise SamplingParamsError(f"ignore_eos must be true or false, got {self.ignore_eos!r}.")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._put(name, _whole(name, getattr(self, name), 0))
        self._put("num_samples", _whole("num_samples", self.num_samples, 1))

    def _put(self, name: str, value: object) -> None:
        """Sets a field of the frozen object during initialisation."""
        object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        params: SamplingParams | Mapping[str, object] | None,
        num_samples: int | None = None,
        logprobs: int | Unset | None = UNSET,
    ) -> SamplingParams:
        """Converts `params` to SamplingParams and merges the `num_samples` and `logprobs` of a call.

        Args:
            params: SamplingParams, a dict of its fields (`max_new_tokens` is accepted for `max_tokens`), or None for
                the defaults.
            num_samples: samples per prompt; None: as in `params`.
            logprobs: as the field; UNSET: as in `params`.

        Raises:
            SamplingParamsError: an unknown key, both spellings of one, an invalid value, or two different values.
        """
        if params is None:
            params = cls()
        elif isinstance(params, Mapping):
            params = cls(**cls._known(params))  # type: ignore[arg-type]  # the constructor validates them
        elif not isinstance(params, cls):
            raise SamplingParamsError(
                f"sampling_params must be SamplingParams or a dict, got {type(params).__name__}. "
                "Parameters of an engine's own are not accepted."
            )
        given = {"num_samples": num_samples} if num_samples is not None else {}
        if logprobs is not UNSET:
            given["logprobs"] = logprobs  # type: ignore[assignment]
        for name, value in given.items():
            other = getattr(params, name)
            if other not in (value, DEFAULTS[name]):
                raise SamplingParamsError(
                    f"{name}={value} in the call contradicts {name}={other} in sampling_params. Give it once."
                )
        return replace(params, **given) if given else params  # type: ignore[arg-type]

    @classmethod
    def _known(cls, params: Mapping[str, object]) -> dict[str, object]:
        names = {field.name for field in fields(cls)}
        clean: dict[str, object] = {}
        for key, value in params.items():
            name = ALIASES.get(key, key)
            if name not in names:
                raise SamplingParamsError(unknown_name("sampling parameter", key, names | set(ALIASES)) + ".")
            if name in clean:
                raise SamplingParamsError(f"{name} is given twice, as {name} and as {key}. Give it once.")
            clean[name] = value
        return clean

    @classmethod
    def from_dict(cls, params: Mapping[str, object]) -> SamplingParams:
        """Converts a dict, as in Twinkle: `SamplingParams.from_dict({"max_tokens": 16})`.

        Raises:
            SamplingParamsError: an unknown key, both spellings of one, or an invalid value.
        """
        return cls.of(params)


DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingParams(_DerivedParams):
    """The fields of SamplingParams that all groups of a request share; each group has its own count and seed."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] | tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = 0
    prompt_logprobs: int | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> DecodingParams:
        shared = {field.name: getattr(params, field.name) for field in fields(cls)}
        return cls(**shared | {"stop": _stop(params.stop)})
