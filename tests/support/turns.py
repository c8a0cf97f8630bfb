"""Turns of a conversation without an engine: prompts, and features of samples with a given text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.responses import columns
from twinkle_serve.data_format import SampleColumns, SampleResponse
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import Prompt, encode_inputs

USER = {"role": "user", "content": "1+1="}


def tokens_of(template: Template, text: str) -> list[int]:
    """One token per byte, where a tokenizer would use fewer: sampled tokens often differ from their text's encoding.

    Special tokens are one token each.
    """
    special = {token: template.tokenizer.convert_tokens_to_ids(token) for token in template.special_tokens}
    parts = re.findall("|".join([*map(re.escape, sorted(special, key=len, reverse=True)), "."]), text, re.DOTALL)
    encode = template.tokenizer.encode
    return [
        i for part in parts for i in ([special[part]] if part in special else encode(part, add_special_tokens=False))
    ]


@dataclass(frozen=True)
class Made(Prompt):
    """A prompt and its input."""

    item: Any = None


def feature_of(prompt: Made, template: Template, text: str, **fields: Any) -> dict[str, Any]:
    """Returns `new_input_feature` of a sample with that text, without logprobs.

    Args:
        fields: other columns of the sample.
    """
    return dict(response_of(prompt, template, text, **fields).sequences[0].new_input_feature)


def response_of(prompt: Made, template: Template, text: str, **fields: Any) -> SampleResponse:
    """As `feature_of`, the response with the sample."""
    tokens = np.array(tokens_of(template, text), np.int32)
    sampled = columns(0, [text])
    made = SampleColumns(
        **{
            **{name: getattr(sampled, name) for name in sampled.__dataclass_fields__},
            "tokens": tokens,
            "lengths": np.array([len(tokens)], np.int32),
            "logprobs": None,
            "logprob_tokens": None,
            **fields,
        }
    )
    return SampleResponse(
        columns=made,
        prompts=[prompt.ids],
        inputs=[prompt.item],
        logprobs_mode="raw_logprobs",
        parser=template.message_parser(),
        turns=(prompt.turn,),
        prompt_indices=(0,),
    )


def prompt_of(item: Any, template: Template) -> Made:
    (prompt,) = encode_inputs(item, template)
    return Made(prompt.ids, turn=prompt.turn, item=item)


def after(feature: dict[str, Any], *messages: dict[str, Any]) -> dict[str, Any]:
    return {**feature, "messages": [*feature["messages"], *messages]}


def suffix_of(template: Template, text: str, *messages: dict[str, Any], tools: Any = None) -> str:
    """Text between a sample's tokens and the next turn."""
    item = {"messages": [USER], **({"tools": tools} if tools else {})}
    feature = feature_of(prompt_of(item, template), template, text)
    ids = feature["input_ids"]
    following = prompt_of(after(feature, *messages), template).ids.tolist()
    assert following[: len(ids)] == ids
    return template.decode(np.array(following[len(ids) :], np.int32))
