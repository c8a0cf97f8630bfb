"""From a model's logits to those that a token is drawn from, for engines that do it here: torch and fake.

The steps and their order are vLLM's: allowed tokens, bad words, minimum length, bias, penalties, temperature, min-p,
top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.samples import FloatArray
from twinkle_serve.data_format.sampling_params import DecodingParams

Encode = Callable[[str], Sequence[int]]
"""Tokenises a text, without special tokens."""


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """Token ids that begin and end a model's thinking."""

    start: Sequence[int]
    end: Sequence[int]

    def forced(self, prompt: Sequence[int], tokens: Sequence[int], budget: int) -> int | None:
        """Returns the token that ends thinking of more than `budget` tokens; None where nothing is forced."""
        if self.start[0] not in prompt and self.start[0] not in tokens:  # most requests, and much faster
            return None
        context = [*prompt, *tokens]
        begun, ended = _rfind(context, self.start), _rfind(context, self.end)
        if begun <= ended or len(context) - begun - len(self.start) < budget:
            return None
        written = next(k for k in reversed(range(len(self.end))) if [*tokens[len(tokens) - k :]] == [*self.end[:k]])
        return self.end[written]


def _rfind(context: Sequence[int], wanted: Sequence[int]) -> int:
    """Returns where some tokens are found last; −1 if nowhere."""
    places = reversed(range(len(context) - len(wanted) + 1))
    return next((at for at in places if [*context[at : at + len(wanted)]] == [*wanted]), -1)


class LogitsProcessor:
    """Processes the logits of one sample."""

    def __init__(
        self,
        params: DecodingParams,
        prompt: NDArray[np.int32],
        ending: Iterable[int],
        encode: Encode,
        thinking: ThinkingMarks | None = None,
    ) -> None:
        """
        Args:
            prompt: token ids, shape [P].
            ending: end-of-sequence ids of the model.
            encode: tokenises bad words.
            thinking: marks of the model's thinking, for a budget.
        """
        self._params = params
        self._thinking = thinking
        self._prompt_ids = prompt.tolist()
        self._prompt = np.unique(prompt)
        self._ending = np.array(sorted({*ending, *params.stop_token_ids}), np.int64)
        self._bad_words = bad_word_ids(params.bad_words, encode)
        self._allowed = None if params.allowed_token_ids is None else np.array(params.allowed_token_ids, np.int64)
        bias = params.logit_bias or {}
        self._biased, self._bias = np.array([*bias], np.int64), np.array([*bias.values()], np.float32)

    def __call__(self, raw: FloatArray, tokens: Sequence[int]) -> FloatArray:
        """Returns logits of the distribution to draw from; −inf for tokens that cannot be drawn. `raw` stays as it is.

        Args:
            raw: the model's, shape [V].
            tokens: those that the sample has.
        """
        params = self._params
        if (forced := self._forced(tokens)) is not None:
            logits = np.full_like(raw, -np.inf)
            logits[forced] = 0
            return logits
        logits = raw.copy()
        if self._allowed is not None:
            logits = np.full_like(raw, -np.inf)
            logits[self._allowed] = raw[self._allowed]
        for word in self._bad_words:
            before = len(word) - 1
            if not before or [*tokens[-before:]] == word[:-1]:
                logits[word[-1]] = -np.inf
        if len(tokens) < params.min_tokens:
            logits[self._ending] = -np.inf
        logits[self._biased] += self._bias
        self._penalise(logits, tokens)
        if params.greedy:
            return logits
        return truncated(logits / params.temperature, params.min_p, params.top_k, params.top_p)

    def _forced(self, tokens: Sequence[int]) -> int | None:
        """Returns the token that has to be next, to end a thinking that is over its budget."""
        budget = self._params.thinking_token_budget
        if budget is None or self._thinking is None:
            return None
        return self._thinking.forced(self._prompt_ids, tokens, budget)

    def _penalise(self, logits: FloatArray, tokens: Sequence[int]) -> None:
        params = self._params
        sampled, counts = np.unique(np.asarray(tokens, np.int64), return_counts=True)
        if (repetition := params.repetition_penalty) != 1:
            seen = np.union1d(self._prompt, sampled)
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / repetition, values * repetition)
        if params.frequency_penalty or params.presence_penalty:
            penalty = params.frequency_penalty * counts + params.presence_penalty
            logits[sampled] -= penalty.astype(np.float32)


def truncated(logits: FloatArray, min_p: float, top_k: int, top_p: float) -> FloatArray:
    """Sets logits to −inf that are below min-p, outside the top k, or outside the smallest set that reaches top-p.
    Shape [V]."""
    if min_p:
        probabilities = softmax(logits)
        logits = np.where(probabilities < min_p * probabilities.max(), -np.inf, logits)
    if 0 < top_k < len(logits):
        logits = np.where(logits < np.partition(logits, -top_k)[-top_k], -np.inf, logits)
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        ordered = softmax(logits)[order]
        logits = logits.copy()
        logits[order[np.cumsum(ordered) - ordered >= top_p]] = -np.inf
    return logits


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log probabilities, nats. Shape [V]."""
    shifted = logits - logits.max()
    result: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return result


def softmax(logits: FloatArray) -> FloatArray:
    """Probabilities. Shape [V]."""
    result: FloatArray = np.exp(log_softmax(logits))
    return result


def kept_tokens(logits: FloatArray) -> NDArray[np.int32]:
    """Returns the ids that can be drawn, ascending."""
    return np.flatnonzero(np.isfinite(logits)).astype(np.int32)


def bad_word_ids(words: Iterable[str] | None, encode: Encode) -> list[list[int]]:
    """Tokenises bad words as vLLM does: at the beginning of a text, and after a space where that begins with another
    token and is as long."""
    found: list[list[int]] = []
    for word in words or ():
        for prefix in ("", " "):
            ids = [*encode(prefix + word.lstrip())]
            if ids and (not prefix or (found and ids[0] != found[-1][0] and len(ids) == len(found[-1]))):
                found.append(ids)
    return found


def logprob_row(source: FloatArray, token: int, k: int, named: Sequence[int]) -> tuple[FloatArray, NDArray[np.int64]]:
    """Returns logprobs and token ids at a position: the token's, the k likeliest, the named ones. Shape [1 + k + n].

    Args:
        source: logits, shape [V].
    """
    logprobs = log_softmax(source)
    top = np.argsort(-logprobs, kind="stable")[:k] if k else np.empty(0, np.int64)
    ids = np.concatenate([[token], top, np.asarray(named, np.int64)]).astype(np.int64)
    return logprobs[ids], ids
