"""Logprobs in OpenAI's two forms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinkle_serve.data_format.sample_updates import SampleUpdate
from twinkle_serve.data_format.samples import PromptScores
from twinkle_serve.data_format.sequence import SampledSequence
from twinkle_serve.gateway.samplers import Sampler

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have, as in vLLM's server."""

Position = Sequence[tuple[int, float]]
"""(token id, log p) at one position: the sampled token, then others."""


@dataclass(frozen=True, slots=True)
class TokenNames:
    """Texts of tokens, as clients ask for them."""

    texts: Mapping[int, str]
    as_ids: bool = False
    """Write `token_id:7` instead of the text."""

    @classmethod
    async def of(cls, sampler: Sampler, positions: Sequence[Position | None], as_ids: bool) -> TokenNames:
        """Fetches the texts of all tokens at some positions."""
        if as_ids:
            return cls({}, True)
        return cls(await sampler.token_texts(token for position in positions for token, _ in position or ()))

    def __getitem__(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.texts[token]


def positions_of(sequence: SampledSequence) -> Sequence[Position]:
    """Returns the logprobs of a sample; an empty list if it has none."""
    return sequence.logprobs or []


def positions_of_update(update: SampleUpdate) -> list[Position]:
    """Returns the logprobs of the tokens of an update; an empty list if the call has none."""
    if update.logprobs is None:
        return []
    values = update.logprobs.tolist()
    if update.logprob_tokens is None:
        return [[(token, row[0])] for token, row in zip(update.tokens.tolist(), values, strict=True)]
    return [
        list({token: (token, value) for token, value in zip(ids, row, strict=True) if token != -1}.values())
        for ids, row in zip(update.logprob_tokens.tolist(), values, strict=True)
    ]


def positions_of_prompt(ids: Sequence[int], scores: PromptScores) -> list[Position | None]:
    """Returns the logprobs of a prompt's tokens from the scores' start on; None for its first token."""
    positions: list[Position | None] = []
    for i, value in enumerate(scores.logprobs.tolist()):
        at = scores.start + i
        if at == 0:
            positions.append(None)
            continue
        top = zip(scores.top_tokens[i].tolist(), scores.top_logprobs[i].tolist(), strict=True)
        own = int(ids[at])
        positions.append([(own, value), *((token, p) for token, p in top if token not in (own, -1))])
    return positions


def finite(logprob: float) -> float:
    """Returns a logprob as JSON can hold it."""
    return logprob if math.isfinite(logprob) else LOWEST


def completion_logprobs(
    positions: Sequence[Position | None], names: TokenNames, top: int, first_offset: int = 0
) -> dict[str, Any]:
    """Returns `logprobs` of a completion: parallel lists.

    Args:
        top: number of likeliest tokens; the sampled one is there besides.
        first_offset: of the first token in the text.
    """
    tokens, values, tops, offsets = [], [], [], []
    offset = first_offset
    for position in positions:
        if position is None:
            raise ValueError("a position without a token")
        token, value = position[0]
        text = names[token]
        tokens.append(text)
        values.append(None if math.isnan(value) else finite(value))
        likeliest = position[: 1 + top] if top else position[:1]
        tops.append(None if math.isnan(value) else {names[t]: finite(p) for t, p in reversed(likeliest)})
        offsets.append(offset)
        offset += len(text)
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def chat_logprobs(positions: Sequence[Position], names: TokenNames, top: int) -> list[dict[str, Any]]:
    """Returns `logprobs.content` of a chat completion.

    Args:
        top: number of likeliest tokens at each position.
    """
    return [
        {
            **_named(position[0], names),
            "top_logprobs": [_named(each, names) for each in sorted(position, key=lambda each: -each[1])[:top]],
        }
        for position in positions
    ]


def _named(each: tuple[int, float], names: TokenNames) -> dict[str, Any]:
    text = names[each[0]]
    return {"token": text, "logprob": finite(each[1]), "bytes": list(text.encode())}
