"""Checks of a call's prompts and parameters against an engine, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.groups import EngineInfo
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.engines.logits import bad_word_ids
from twinkle_serve.errors import PromptError, SamplingParamsError


class Tokenizer(Protocol):
    """The part of a tokenizer that reads bad words."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


def check_fits(info: EngineInfo, prompt_ids: NDArray[np.int32], params: SamplingParams, where: str = "prompt") -> None:
    """Checks a prompt against the limits of an engine.

    Raises:
        PromptError: empty, too long for the context, or ids outside the vocabulary.
        SamplingParamsError: more tokens or positions are asked for than there is room for.
    """
    length = len(prompt_ids)
    if not length:
        raise PromptError(f"{where} is empty. Give it at least one token.")
    room = 0 if params.max_tokens == 0 and info.scores_full_context else 1
    if length > info.max_model_len - room:
        raise PromptError(
            f"{where} has {length} tokens, the context holds {info.max_model_len}"
            f"{', one of them for a sampled token' if room else ''}. "
            "Shorten it, or raise engine_args.max_model_len."
        )
    low, high = int(prompt_ids.min()), int(prompt_ids.max())
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise PromptError(
            f"{where} holds token id {bad}, the model's vocabulary is 0 to {info.vocab_size - 1}. "
            "Tokenise it with this model's tokenizer."
        )
    if length + params.min_tokens > info.max_model_len:
        raise SamplingParamsError(
            f"min_tokens={params.min_tokens} does not fit: {where} has {length} tokens, the context holds "
            f"{info.max_model_len}. Lower it, or shorten the prompt."
        )
    if params.prompt_logprobs_start >= length:
        raise SamplingParamsError(
            f"prompt_logprobs_start={params.prompt_logprobs_start}, but {where} has {length} tokens. Lower it."
        )


def check_params(info: EngineInfo, params: SamplingParams, tokenizer: Tokenizer) -> None:
    """Checks parameters against an engine and its model.

    Raises:
        SamplingParamsError: the engine lacks one, ids outside the vocabulary, more logprobs than it returns, or no
            token would be left to sample.
    """
    for name, remedy in info.lacks.items():
        given = getattr(params, name)
        if given is not None and given is not False and (name != "logprobs_mode" or given != info.logprobs_mode):
            raise SamplingParamsError(f"{name} is not available: {remedy}")
    listed: dict[str, Iterable[int]] = {
        "stop": [item for item in params.stop or () if isinstance(item, int)],
        "stop_token_ids": params.stop_token_ids or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "logprob_token_ids": params.logprob_token_ids or (),
        "logit_bias": params.logit_bias or (),
    }
    for name, ids in listed.items():
        if (last := max(ids, default=0)) >= info.vocab_size:
            raise SamplingParamsError(
                f"{name} holds token id {last}, the model's vocabulary is 0 to {info.vocab_size - 1}. Use ids of this "
                "model's tokenizer."
            )
    named = len(params.logprob_token_ids or ())
    if named and (params.logprobs or 0) + named > info.vocab_size:
        raise SamplingParamsError(
            f"logprobs={params.logprobs} and {named} logprob_token_ids are more than the vocabulary of "
            f"{info.vocab_size} tokens. Lower logprobs."
        )
    most = min(info.max_logprobs, info.vocab_size)
    for name, k in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if k is not None and k > most:
            raise SamplingParamsError(
                f"{name}={k}, the engine returns at most {most}. Lower it, or raise engine_args.max_logprobs."
            )
    _check_some_token_is_left(info, params, tokenizer)


def _check_some_token_is_left(info: EngineInfo, params: SamplingParams, tokenizer: Tokenizer) -> None:
    """Raises SamplingParamsError where some step would have no token to sample: engines would return anything then."""
    ending = {*info.eos_token_ids, *params.all_stop_token_ids} if params.min_tokens else set[int]()
    if params.allowed_token_ids is None:
        if len(ending) >= info.vocab_size:
            raise SamplingParamsError(
                f"stop_token_ids holds all {info.vocab_size} tokens, and min_tokens excludes them. Name fewer."
            )
        return
    left = {*params.allowed_token_ids}
    words = bad_word_ids(params.bad_words, lambda text: tokenizer.encode(text, add_special_tokens=False))
    excluded = {"bad_words": {word[-1] for word in words}, "min_tokens": ending}
    for ids in excluded.values():
        left -= ids
    if not left:
        others = " and ".join(name for name, ids in excluded.items() if ids & {*params.allowed_token_ids})
        raise SamplingParamsError(
            f"allowed_token_ids has {len(params.allowed_token_ids)} tokens, and {others} may exclude all of them. "
            "Allow one more, or drop one of the parameters."
        )
