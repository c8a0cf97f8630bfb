"""Converts groups to requests of vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle_serve.data_format.groups import EngineInfo, Group
from twinkle_serve.engines.protocol import max_new_tokens

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def sampling_params(info: EngineInfo, group: Group, *, streaming: bool) -> SamplingParams:
    """Converts a group's parameters to vLLM's."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = group.params
    return SamplingParams(
        n=1 if params.greedy else group.count,
        # vLLM samples at least one token; a score discards it.
        max_tokens=max(1, max_new_tokens(info, group)),
        temperature=params.temperature,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        repetition_penalty=params.repetition_penalty,
        # vLLM gives child j of a request seed + j, as Group.seed_of does.
        seed=group.seed,
        stop=list(params.stop_strings),
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        flat_logprobs=True,
        detokenize=bool(params.stop_strings),
        skip_special_tokens=False,
        output_kind=RequestOutputKind.DELTA if streaming else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # not shared; a deep copy is a third of a sample's cost in this process
    )
