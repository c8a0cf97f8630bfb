"""Bodies of native requests. Their fields are those of the calls from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import Field, WithJsonSchema, field_validator
from pydantic.config import JsonDict

from twinkle_serve import timing
from twinkle_serve.data_format.sample_request import SampleOptions
from twinkle_serve.data_format.weights import PauseMode
from twinkle_serve.gateway.bodies import Body
from twinkle_serve.gateway.errors import InvalidRequestError

INPUT_SCHEMAS: list[JsonDict] = [
    {
        "title": "Trajectory",
        "type": "object",
        "required": ["messages"],
        "properties": {
            "messages": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["role", "content"],
                    "properties": {"role": {"enum": ["system", "user", "assistant", "tool"]}},
                },
            },
            "tools": {"type": "array", "items": {"type": "object"}},
        },
    },
    {
        "title": "InputFeature",
        "type": "object",
        "required": ["input_ids"],
        "properties": {"input_ids": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}},
    },
    {
        "title": "Text",
        "type": "object",
        "required": ["text"],
        "properties": {"text": {"type": "string", "minLength": 1}},
    },
]
"""Kinds of inputs, as the document describes them. The router validates them."""

Input: TypeAlias = Annotated[
    dict[str, Any], WithJsonSchema({"anyOf": INPUT_SCHEMAS, "description": "As `Trajectory` and `InputFeature`."})
]
"""A conversation (`messages`, `tools`), token ids (`input_ids`) or a text (`text`)."""
Params: TypeAlias = dict[str, Any]


class OfSampler(Body):
    """A request to one of the gateway's samplers."""

    sampler: str | None = Field(default=None, description="Name of a sampler of the gateway; null: the first one.")


class OfInputs(OfSampler):
    """A request about inputs."""

    inputs: Input | list[Input] = Field(
        description="A conversation (`messages`, `tools`), token ids (`input_ids`) or a text (`text`), or a list of "
        "one kind."
    )
    template: str | None = Field(default=None, description="Name of a template; null: that of the sampler's config.")

    @field_validator("inputs")
    @classmethod
    def _refuse_flags(cls, inputs: Input | list[Input]) -> Input | list[Input]:
        """Raises InvalidRequestError for true or false among token ids, which numpy takes for 1 and 0."""
        for i, each in enumerate(inputs if isinstance(inputs, list) else [inputs]):
            ids = each.get("input_ids")
            if isinstance(ids, list) and bool in set(map(type, ids)):
                raise InvalidRequestError(f"inputs[{i}].input_ids must be whole numbers, got true or false.", "inputs")
        return inputs

    @property
    def input_list(self) -> list[Input]:
        return self.inputs if isinstance(self.inputs, list) else [self.inputs]


class OfAdapter(OfInputs):
    """A request about inputs, to be computed with an adapter or without."""

    adapter_name: str = Field(default="", description="`name`, `name@version`, or empty for the base model.")
    use_base_model: bool = Field(default=False, description="The base model, said explicitly.")
    track: str = Field(default="", description="Track whose engines compute it, of GET /status; empty: the first.")
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def options(self) -> dict[str, Any]:
        """Returns the options of a SampleRequest. Raises InvalidRequestError if two fields contradict each other."""
        if self.adapter_name and self.use_base_model:
            raise InvalidRequestError(
                f"adapter_name={self.adapter_name!r} and use_base_model contradict each other. Give one of them.",
                "use_base_model",
            )
        return {"template": self.template, "use_base_model": self.use_base_model, "track": self.track}


class SampleBody(OfAdapter):
    """Body of `POST /sample`."""

    sampling_params: Params | list[Params] | None = Field(
        default=None, description="Sampling parameters of all inputs, or a list with those of each."
    )
    num_samples: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=0, ge=0)
    continue_final_message: bool | None = None
    sample_timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    min_groups: int | None = Field(default=None, ge=1)
    engine: str = Field(default="", description="The only engine that may sample it, of GET /status; empty: any.")

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            **super().options(),
            **SampleOptions(
                num_samples=self.num_samples,
                continue_final_message=self.continue_final_message,
                sample_timeout_s=self.sample_timeout_s,
                min_groups=self.min_groups,
                engine=self.engine,
            ),
        }
        if "logprobs" in self.model_fields_set:
            options["logprobs"] = self.logprobs
        return options

    def params(self) -> Params | list[Params] | None:
        """Returns the sampling parameters. Raises InvalidRequestError for a key of logit_bias that is no token id."""
        given = self.sampling_params
        return [*map(_with_token_ids, given)] if isinstance(given, list) else given and _with_token_ids(given)

    @property
    def most_samples(self) -> int:
        """The largest number of samples that it asks for; an invalid number counts as 1."""
        given = self.sampling_params if isinstance(self.sampling_params, list) else [self.sampling_params or {}]
        return max(
            (self.num_samples or 1, *_whole(params.get(name) for params in given for name in ("num_samples", "n")))
        )


class ScoreBody(OfAdapter):
    """Body of `POST /score`."""

    top_logprobs: int = Field(default=0, ge=0, description="Likeliest tokens to return at each position.")


class EncodeBody(OfInputs):
    """Body of `POST /encode` and `POST /count_tokens`."""

    continue_final_message: bool | None = None
    add_generation_prompt: bool = Field(
        default=True, description="End at the beginning of the assistant's turn, or after the last message."
    )


class DecodeBody(OfSampler):
    """Body of `POST /decode`."""

    token_ids: list[int] | list[list[int]]
    template: str | None = None
    skip_special_tokens: bool = False


class PauseBody(OfSampler):
    """Body of `POST /pause`."""

    mode: PauseMode = Field(default="keep", description="Fate of running samples; of a new pause.")
    lease_s: float = Field(
        default=30.0, gt=0, le=timing.MAX_PAUSE_LEASE_S, description="The pause ends after this time, unless renewed."
    )
    pause: int | None = Field(default=None, ge=0, description="A pause to renew; null: begin one.")


class ResumeBody(OfSampler):
    """Body of `POST /resume`."""

    pause: int = Field(ge=0)


class CancelBody(OfSampler):
    """Body of `POST /calls/cancel`."""

    id: str = Field(min_length=1, max_length=1000, description="Of a call, as GET /calls has it.")


class EngineBody(OfSampler):
    """Body of the routes of `/engines`."""

    engine: str = Field(min_length=1, max_length=1000)
    timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=timing.MAX_PAUSE_LEASE_S,
        description="How long it may finish what it runs; the rest is sampled elsewhere. Of no use to undrain.",
    )


def _whole(values: Iterable[object]) -> Iterable[int]:
    return (value for value in values if isinstance(value, int) and not isinstance(value, bool))


def _with_token_ids(params: Mapping[str, Any]) -> Params:
    """Returns parameters whose `logit_bias` has token ids for keys; in JSON, keys are text."""
    bias = params.get("logit_bias")
    if not isinstance(bias, dict):
        return dict(params)
    if wrong := [key for key in bias if not (key.isascii() and key.isdecimal() and len(key) < 12)]:
        raise InvalidRequestError(f"logit_bias has the key {wrong[0]!r}, which is not a token id.", "logit_bias")
    return {**params, "logit_bias": {int(key): value for key, value in bias.items()}}
