"""Converts groups to requests of vLLM."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.data_format.structured_outputs import StructuredOutputs
from twinkle_serve.engines.protocol import max_new_tokens
from twinkle_serve.errors import SamplingParamsError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams


def sampling_params(info: EngineInfo, group: Group, *, streaming: bool, grammars: str) -> SamplingParams:
    """Converts a group's parameters to vLLM's.

    Args:
        grammars: vLLM's backend for structured outputs, which `GrammarChecks` has checked.

    Raises:
        SamplingParamsError: a combination that vLLM does not have on this device.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params, structured = group.params, group.params.structured_outputs
    kind = SamplingParams if structured is None else checked_params_class()
    return kind(
        n=1 if params.greedy else group.count,
        # vLLM samples at least one token; a score discards it.
        max_tokens=max(1, max_new_tokens(info, group)),
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=None if params.logit_bias is None else dict(params.logit_bias),
        allowed_token_ids=None if params.allowed_token_ids is None else list(params.allowed_token_ids),
        bad_words=None if params.bad_words is None else list(params.bad_words),
        # vLLM gives child j of a request seed + j, as Group.seed_of does.
        seed=group.seed,
        stop=list(params.stop_strings),
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        structured_outputs=None if structured is None else structured_outputs_params(structured, grammars),
        prompt_logprobs=params.prompt_logprobs,
        flat_logprobs=True,
        detokenize=bool(params.stop_strings),
        skip_special_tokens=False,
        include_stop_str_in_output=params.include_stop_str_in_output,
        output_kind=RequestOutputKind.DELTA if streaming else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # not shared; a deep copy is a third of a sample's cost in this process
        **(_own(params) if info.device == "cpu" else _vllms(params)),
    )


def _own(params: DecodingParams) -> dict[str, Any]:
    """Parameters that a `RequestSampler` serves."""
    named, extras = [*params.logprob_token_ids], dict[str, object]()
    if named:
        extras |= {"top": params.logprobs, "named": named}
    if params.logprobs_mode is not None:
        extras["logprobs_mode"] = params.logprobs_mode
    if params.return_sampling_mask:
        extras["mask"] = True
    if params.thinking_token_budget is not None:
        extras["thinking_budget"] = params.thinking_token_budget
    logprobs = None if params.logprobs is None else params.logprobs + len(named)
    return {"logprobs": logprobs, "extra_args": extras or None}


def _vllms(params: DecodingParams) -> dict[str, Any]:
    """The same where workers have vLLM's own sampler."""
    budget = {"thinking_token_budget": params.thinking_token_budget}
    if not params.logprob_token_ids:
        return {"logprobs": params.logprobs, **budget}
    if params.logprobs:
        raise SamplingParamsError(
            f"logprobs={params.logprobs} and logprob_token_ids are not available together on a GPU. Set logprobs to 0, "
            "or send two calls."
        )
    return {"logprob_token_ids": [*params.logprob_token_ids], **budget}


@functools.cache
def checked_params_class() -> type[SamplingParams]:
    """SamplingParams whose structured outputs `GrammarChecks` has checked: vLLM would validate them again for each
    request, on the event loop."""
    from vllm.sampling_params import SamplingParams

    class CheckedSamplingParams(SamplingParams):  # type: ignore[misc]  # mypy does not follow vLLM
        def _validate_structured_outputs(self, *args: Any) -> None:
            pass

    return CheckedSamplingParams


def structured_outputs_params(outputs: StructuredOutputs, backend: str) -> StructuredOutputsParams:
    """Converts structured outputs to vLLM's, as its validation for a backend leaves them."""
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.structured_output.utils import choice_as_grammar

    given: dict[str, Any]
    if outputs.choice is None:
        given = {outputs.kind: outputs.spec}
    elif backend == "xgrammar":
        given = {"grammar": choice_as_grammar(list(outputs.choice))}
    else:
        given = {"choice": list(outputs.choice)}
    params = StructuredOutputsParams(**given)
    params._backend = backend
    return params
