"""`asample` as a call of the router."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.tinker.bodies import SampleBody, TensorBody
from twinkle_serve.gateway.tinker.positions import positions_of, targets_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The parts of an answer that a request asks for. It travels with the call, so that any gateway process can answer.

    Its form is JSON: the router need not know this class.
    """

    prompt_logprobs: bool = False
    topk_prompt: int = 0
    topk_sample: int = 0
    targets: TensorBody | None = None
    alternatives: int = 0

    @classmethod
    def of(cls, body: SampleBody) -> Wanted:
        return cls(
            prompt_logprobs=bool(body.prompt_logprobs),
            topk_prompt=body.topk_prompt_logprobs,
            topk_sample=body.topk_sample_logprobs,
            targets=body.target_prompt_logprobs,
            alternatives=body.prompt_alt_tokens_k,
        )

    def packed(self) -> bytes:
        targets = None if self.targets is None else self.targets.model_dump(exclude_none=True)
        fields = [self.prompt_logprobs, self.topk_prompt, self.topk_sample, targets, self.alternatives]
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def unpacked(cls, packed: bytes) -> Wanted:
        prompt_logprobs, topk_prompt, topk_sample, targets, alternatives = json.loads(packed)
        return cls(
            prompt_logprobs=prompt_logprobs,
            topk_prompt=topk_prompt,
            topk_sample=topk_sample,
            targets=None if targets is None else TensorBody.model_validate(targets),
            alternatives=alternatives,
        )


@dataclass(frozen=True, slots=True)
class TinkerCall:
    """Inputs of a call and the parameters of each: the prompt first, then those by which its positions are read."""

    inputs: list[dict[str, Any]]
    params: list[SamplingParams]


def call_of(body: SampleBody, context: GatewayContext) -> TinkerCall:
    """Reads a request.

    Raises:
        RequestError: something in it cannot be honoured.
    """
    _require_supported(body)
    context.require_prompts(1, body.num_samples)
    prompt = tokens_of(body.prompt.chunks)
    params = params_of(body, len(prompt))
    tensor = body.target_prompt_logprobs
    targets = [] if tensor is None else targets_of(tensor, len(prompt))
    positions = positions_of(targets, body.prompt_alt_tokens_k, len(prompt), params.temperature, params.seed)
    context.require_prompts(1 + len(positions), max(1, body.prompt_alt_tokens_k))
    return TinkerCall(
        [{"input_ids": prompt}, *(position.input(prompt) for position in positions)],
        [params, *(position.params for position in positions)],
    )


def _require_supported(body: SampleBody) -> None:
    """Raises InvalidRequestError for what no sampler here does."""
    if body.record_stability_info:
        raise InvalidRequestError("record_stability_info is not supported. Leave it out.", "record_stability_info")
    for name in ("base_model", "model_path"):
        if getattr(body, name) is not None:
            raise InvalidRequestError(f"{name} is that of the sampling session. Leave it out of requests.", name)
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        if getattr(body, name) < 0:
            raise InvalidRequestError(f"{name} must be 0 or more, got {getattr(body, name)}.", name)


def tokens_of(chunks: Sequence[dict[str, Any]]) -> list[int]:
    """Joins the tokens of a prompt's chunks. Raises InvalidRequestError if one holds anything else."""
    tokens: list[int] = []
    for i, chunk in enumerate(chunks):
        where = f"prompt.chunks[{i}]"
        if (kind := chunk.get("type", "encoded_text")) != "encoded_text":
            raise InvalidRequestError(f"{where} is of type {kind!r}; samplers here take tokens alone.", where)
        given = chunk.get("tokens")
        if not isinstance(given, list) or any(type(token) is not int for token in given) or chunk.keys() - _CHUNK_KEYS:
            raise InvalidRequestError(f"{where} must be {{type, tokens}}, with a list of token ids.", where)
        tokens += given
    return tokens


_CHUNK_KEYS = {"type", "tokens"}


def params_of(body: SampleBody, prompt_length: int) -> SamplingParams:
    """Returns the sampling parameters of the request's samples.

    An object of parameters is complete: nothing of the sampler's config is added. Raises RequestError.
    """
    given = body.sampling_params
    scores_prompt = bool(body.prompt_logprobs) or body.topk_prompt_logprobs > 0
    return SamplingParams(
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        seed=given.seed,
        stop=given.stop or None,
        ignore_eos=given.stop == [],
        logprobs=body.topk_sample_logprobs,
        prompt_logprobs=body.topk_prompt_logprobs if scores_prompt else None,
        prompt_logprobs_start=_first_scored(body, prompt_length),
        num_samples=body.num_samples,
    )


def _first_scored(body: SampleBody, prompt_length: int) -> int:
    """Returns the position from which on prompt tokens are scored. Raises InvalidRequestError."""
    last_n = body.prompt_logprobs_last_n
    if last_n is None:
        return 0
    if not body.prompt_logprobs:
        raise InvalidRequestError("prompt_logprobs_last_n needs prompt_logprobs.", "prompt_logprobs_last_n")
    if not 1 <= last_n < max(2, prompt_length):
        raise InvalidRequestError(
            f"prompt_logprobs_last_n must be from 1 to {prompt_length - 1}, the prompt's tokens after the first, "
            f"got {last_n}.",
            "prompt_logprobs_last_n",
        )
    return max(0, prompt_length - last_n)
