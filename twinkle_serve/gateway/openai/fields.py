"""Fields that requests of OpenAI's protocol share, and the sampling parameters that they mean.

Names and types are those of OpenAI and of vLLM's server; tests/unit/gateway compare them with vLLM's classes. Those
classes themselves cost a process 15 s and 500 MiB (docs/decisions/017).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from twinkle_serve.gateway.bodies import Body
from twinkle_serve.gateway.errors import InvalidRequestError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "cache_salt": (),
    "documents": (),
    "ec_transfer_params": (),
    "function_call": (),
    "functions": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": (),
    "watermarking": (False,),
    "web_search_options": (),
}
"""Fields of the protocol that cannot be honoured, with the values that ask for nothing, as null does."""

PARAMS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "min_tokens",
    "skip_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "logprob_token_ids",
    "thinking_token_budget",
    "priority",
)
"""Fields that are sampling parameters of the same name."""


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    """Send the usage in a last chunk without choices."""
    continuous_usage_stats: bool = False
    """Send the usage so far in every chunk."""
    include_obfuscation: bool = False
    """Must be false: chunks are not padded."""


class JSONSchema(Body):
    """`json_schema` of a response format."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def structured_outputs(self) -> dict[str, Any] | None:
        """Returns the structured output that it means. Raises InvalidRequestError."""
        match self.type:
            case "text":
                return None
            case "json_object":
                return {"json": {"type": "object"}}
            case "json_schema":
                if self.json_schema is None or self.json_schema.schema_ is None:
                    raise InvalidRequestError(
                        "response_format.json_schema.schema is missing.", "response_format.json_schema.schema"
                    )
                return {"json": self.json_schema.schema_}


class SamplingFields(Body):
    """Fields that completions and chat completions share."""

    model: str | None = None
    n: int = Field(default=1, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool = True
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    thinking_token_budget: int | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    priority: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    request_id: str | None = Field(default=None, max_length=256)
    session_id: str | None = Field(default=None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return without_neutral(data) if isinstance(data, dict) else data

    def structured(self) -> Mapping[str, Any] | None:
        """Returns what the text has to be. Raises InvalidRequestError if two fields say it."""
        by_format = None if self.response_format is None else self.response_format.structured_outputs()
        if by_format is not None and self.structured_outputs is not None:
            raise InvalidRequestError("response_format and structured_outputs contradict each other. Drop one.")
        return by_format or self.structured_outputs

    def sampling(self) -> dict[str, Any]:
        """Returns the sampling parameters that the request gives; the service's defaults apply to the others.

        Raises:
            InvalidRequestError: two fields contradict each other, or `logit_bias` has a key that is no token id.
        """
        params: dict[str, Any] = {name: value for name in PARAMS if (value := getattr(self, name)) not in (None, [])}
        if self.n > 1:
            params["num_samples"] = self.n
        if self.logit_bias:
            params["logit_bias"] = bias_by_token(self.logit_bias)
        if (structured := self.structured()) is not None:
            params["structured_outputs"] = structured
        if self.prompt_logprobs is not None:
            params["prompt_logprobs"] = self.prompt_logprobs
        return params


def without_neutral(
    data: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL, where: str = ""
) -> dict[str, Any]:
    """Leaves out fields that ask for nothing.

    Args:
        neutral: fields that cannot be honoured, with the values that ask for nothing.
        where: path before the names of fields, with a dot at its end.

    Raises:
        InvalidRequestError: one of these fields asks for something.
    """
    kept = {}
    for key, value in data.items():
        if value is None:
            continue
        if key not in neutral:
            kept[key] = value
        elif value not in neutral[key] and value not in ({}, []):
            raise InvalidRequestError(f"{where}{key}={value!r:.200} is not supported. Leave it out.", where + key)
    return kept


def bias_by_token(logit_bias: Mapping[str, float]) -> dict[int, float]:
    """Returns `logit_bias` by token id. Raises InvalidRequestError if a key is no token id."""
    return {_token(key): bias for key, bias in logit_bias.items()}


def _token(key: str) -> int:
    if not key.isdecimal():
        raise InvalidRequestError(f"logit_bias has the key {key!r}, which is not a token id.", "logit_bias")
    return int(key)
