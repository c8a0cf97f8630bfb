"""Samples that continue on another engine from the tokens that had arrived."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.samples import PartialSample, SampleColumns
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.stops import Decode, Texts


def as_resume_prompt(group: Group, partial: PartialSample) -> Group:
    """Returns the group that samples the rest of a partial sample: its tokens so far become part of the prompt."""
    params, most = group.params, group.params.max_tokens
    if most is not None:
        assert len(partial) < most, (len(partial), most)
        params = replace(params, max_tokens=most - len(partial))
    return replace(group, prompt_ids=np.concatenate([group.prompt_ids, partial.tokens]), params=params, partial=None)


def join_resumed(partial: PartialSample, rest: SampleColumns, params: DecodingParams, decode: Decode) -> SampleColumns:
    """Joins a partial sample and its rest to one sample."""
    gained = PartialSample(
        tokens=rest.tokens,
        logprobs=rest.logprobs,
        logprob_tokens=rest.logprob_tokens,
        weight_versions=rest.weight_versions[0],
    )
    whole = PartialSample.concat([partial, gained])
    texts = Texts.of([whole.tokens.tolist()], [False], params, decode)
    return replace(
        rest,
        lengths=np.array([len(whole)], np.int32),
        tokens=whole.tokens,
        logprobs=whole.logprobs,
        logprob_tokens=whole.logprob_tokens,
        decoded=texts.decoded,
        whole_text=texts.whole,
        weight_versions=[whole.weight_versions],
    )
