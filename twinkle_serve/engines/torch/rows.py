"""Draws and ends the samples of the torch engine's batch, each by its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from twinkle_serve.data_format.groups import Group
from twinkle_serve.data_format.samples import FloatArray, PromptScores, SampleColumns, StopReason
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.protocol import columns_of_group, stop_cut

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedTokenizerBase

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


@dataclass(slots=True)
class Row:
    """One sample in the running batch."""

    params: DecodingParams
    max_tokens: int
    generator: Generator
    """The sample's own."""
    aborted: Callable[[], bool]
    """Whether the sample was cancelled, aborted or has run out of time."""
    on_token: Callable[[int, StopReason | None, bool], None] | None = None
    """Called with each token; for the last one with its stop reason, and whether a stop string cut the text."""
    tokens: list[int] = field(default_factory=list)
    weight_versions: list[tuple[str, int]] = field(default_factory=list)
    """Weights versions that sampled the tokens, each with the index of its first token."""
    logprobs: list[Tensor] = field(default_factory=list)
    """Each of shape [1 + k]."""
    logprob_tokens: list[Tensor] = field(default_factory=list)
    """Each of shape [1 + k]."""
    stop_reason: StopReason | None = None
    decoded: str | None = None
    """The text, if a stop string cut it."""

    def sampled_by(self, label: str) -> None:
        """Records that the next token is sampled by this weights version."""
        if self.weight_versions and self.weight_versions[-1][1] == len(self.tokens):
            self.weight_versions.pop()
        if not self.weight_versions or self.weight_versions[-1][0] != label:
            self.weight_versions.append((label, len(self.tokens)))


class RowSampler:
    """A logits processor that samples each row with its own parameters and random generator.

    It returns logits with one finite entry per row. The order of the steps is vLLM's: repetition penalty, temperature,
    top-k, top-p.
    """

    def __init__(self, rows: Sequence[Row], prompt_mask: Tensor, logprobs_mode: LogprobsMode) -> None:
        self._rows = rows
        self._prompt_mask = prompt_mask
        self._logprobs_mode = logprobs_mode

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        import torch

        logits = logits.float().cpu()
        ids = input_ids.cpu()
        forced = torch.full_like(logits, float("-inf"))
        for i, row in enumerate(self._rows):
            if row.stop_reason is not None:
                forced[i, 0] = 0.0
                continue
            token = self._sample(row, ids[i], logits[i], self._prompt_mask[i])
            forced[i, token] = 0.0
        return forced.to(input_ids.device)

    def _sample(self, row: Row, ids: Tensor, logits: Tensor, prompt_mask: Tensor) -> int:
        import torch

        params = row.params
        raw = logits
        if params.repetition_penalty != 1.0:
            width = len(prompt_mask)
            seen = torch.cat([ids[:width][prompt_mask.bool()], ids[width:]]).unique()
            values = logits[seen]
            penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            logits = logits.index_copy(0, seen, penalised)
        if not params.greedy:
            logits = _truncated(logits / params.temperature, params.top_k, params.top_p)
        if params.greedy:
            token = int(logits.argmax())
        else:
            # The exponential race: argmax of p / Exp(1) is a draw from p.
            noise = torch.empty_like(logits).exponential_(generator=row.generator)
            token = int((logits.softmax(-1) / noise).argmax())
        row.tokens.append(token)
        if params.logprobs is not None:
            source = raw if self._logprobs_mode == "raw_logprobs" else logits
            logprobs = source.log_softmax(-1)
            top = logprobs.topk(params.logprobs)
            row.logprobs.append(torch.cat([logprobs[token : token + 1], top.values]))
            row.logprob_tokens.append(torch.cat([torch.tensor([token]), top.indices]))
        return token


def _truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sets logits outside the top k, or outside the smallest set that reaches top_p, to −inf. Shape [V]."""
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.index_fill(0, order[before >= top_p], float("-inf"))
    return logits


class RowStopper:
    """A stopping criterion that reports which rows are done, and records their stop reasons."""

    def __init__(
        self,
        rows: Sequence[Row],
        eos: set[int],
        tokenizer: PreTrainedTokenizerBase,
        between_tokens: Callable[[], bool],
    ) -> None:
        """
        Args:
            between_tokens: called once per step, while the model is idle; returns whether the batch must end here
                because its unfinished rows must be recomputed.
        """
        self._rows = rows
        self._eos = eos
        self._tokenizer = tokenizer
        self._between_tokens = between_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        import torch

        for row in self._rows:
            if row.stop_reason is None:
                row.stop_reason = "abort" if row.aborted() else self._reason(row)
                if row.on_token is not None:
                    row.on_token(row.tokens[-1], row.stop_reason, row.decoded is not None)
        stale = self._between_tokens()
        done = [stale or row.stop_reason is not None for row in self._rows]
        return torch.tensor(done, device=input_ids.device)

    def _reason(self, row: Row) -> StopReason | None:
        params = row.params
        last = row.tokens[-1]
        if last in params.stop_token_ids or (last in self._eos and not params.ignore_eos):
            return "stop"
        if params.stop_strings:
            text = self._tokenizer.decode(row.tokens, skip_special_tokens=False)
            if (end := stop_cut(text, params.stop_strings)) is not None:
                row.decoded = text[:end]
                return "stop"
        return "length" if len(row.tokens) >= row.max_tokens else None


def group_columns(
    group: Group, engine: str, rows: Sequence[Row], scores: PromptScores | None, tokenizer: PreTrainedTokenizerBase
) -> SampleColumns:
    """Converts the rows of a group, once they are done."""
    import torch

    params = group.params
    logprobs: FloatArray | None = None
    logprob_tokens: NDArray[np.int32] | None = None
    if params.logprobs is not None:
        width = 1 + params.logprobs
        parts = [part for row in rows for part in row.logprobs]
        logprobs = torch.stack(parts).numpy() if parts else np.empty((0, width), np.float32)
        if width > 1:
            ids = [part for row in rows for part in row.logprob_tokens]
            logprob_tokens = torch.stack(ids).numpy().astype(np.int32) if ids else np.empty((0, width), np.int32)
    texts = tokenizer.batch_decode([row.tokens for row in rows], skip_special_tokens=False)
    return columns_of_group(
        group,
        engine,
        [row.tokens for row in rows],
        [text if row.decoded is None else row.decoded for row, text in zip(rows, texts, strict=True)],
        [row.stop_reason or "length" for row in rows],
        logprobs,
        logprob_tokens,
        scores,
        [tuple(row.weight_versions) for row in rows],
    )
