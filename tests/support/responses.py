"""Responses built from texts: one token per character."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinkle_serve.data_format import PromptScores, SampleColumns, SampleResponse
from twinkle_serve.data_format.messages import MessageParser


def columns(group: int, texts: list[str], *, first: int = 0, width: int = 1, scored: bool = False) -> SampleColumns:
    """One sample a text, one token a character."""
    tokens = np.array([ord(c) for text in texts for c in text], np.int32)
    scores = PromptScores(
        logprobs=np.array([np.nan, -group], np.float32),
        top_tokens=np.zeros((2, 0), np.int32),
        top_logprobs=np.zeros((2, 0), np.float32),
    )
    return SampleColumns(
        group=np.full(len(texts), group, np.int64),
        sample=np.arange(first, first + len(texts), dtype=np.int32),
        lengths=np.array([len(text) for text in texts], np.int32),
        tokens=tokens,
        logprobs=None if not width else -np.repeat(tokens[:, None], width, 1).astype(np.float32),
        logprob_tokens=None if width < 2 else np.stack([tokens + i // 2 for i in range(width)], 1),
        stop_reason=np.array([i % 2 for i in range(len(texts))], np.uint8),
        decoded=list(texts),
        seed=np.arange(len(texts)) + 100 * group,
        engine=[f"engine-dp{group}"] * len(texts),
        adapter=[""] * len(texts),
        weight_versions=[(("initial", 0),)] * len(texts),
        scores={group: scores} if scored else {},
    )


def response(parts: list[SampleColumns], inputs: list[dict[str, Any]], prompts: list[list[int]]) -> SampleResponse:
    return SampleResponse(
        columns=SampleColumns.concat(parts),
        prompts=[np.array(p, np.int32) for p in prompts],
        inputs=inputs,
        logprobs_mode="raw_logprobs",
        parser=MessageParser(special_tokens=("<|im_end|>",)),
        prompt_indices=tuple(range(len(prompts))),
    )
