"""How the torch engine draws and ends the samples of a batch, each by its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines.base import stop_cut

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


@dataclass(slots=True)
class Row:
    """One sample in the running batch."""

    params: DecodingParams
    most_tokens: int
    generator: Any
    """torch.Generator of this sample alone."""
    aborted: Callable[[], bool]
    """Whether nobody waits for it any more."""
    on_token: Callable[[int, StopReason | None, bool], None] | None = None
    """Told each token, and with the last one why it is the last, and whether a stop string cut it."""
    tokens: list[int] = field(default_factory=list)
    weight_versions: list[tuple[str, int]] = field(default_factory=list)
    """Versions that have sampled its tokens, each with the first of them."""
    logprobs: list[Any] = field(default_factory=list)
    """Tensors of shape [1 + k]."""
    logprob_tokens: list[Any] = field(default_factory=list)
    stop_reason: StopReason | None = None
    decoded: str | None = None
    """Set where a stop string cut it."""

    def sampled_by(self, label: str) -> None:
        """The next token is of this version."""
        if self.weight_versions and self.weight_versions[-1][1] == len(self.tokens):
            self.weight_versions.pop()
        if not self.weight_versions or self.weight_versions[-1][0] != label:
            self.weight_versions.append((label, len(self.tokens)))


class RowSampler:
    """A logits processor that samples each row by its own parameters and its own random stream.

    It hands generate logits with one finite entry a row. Order of the steps as in vLLM: repetition penalty,
    temperature, top-k, top-p.
    """

    def __init__(self, rows: Sequence[Row], prompt_mask: Any, logprobs_mode: LogprobsMode) -> None:
        self._rows = rows
        self._prompt_mask = prompt_mask
        self._logprobs_mode = logprobs_mode

    def __call__(self, input_ids: Any, logits: Any) -> Any:
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

    def _sample(self, row: Row, ids: Any, logits: Any, prompt_mask: Any) -> int:
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


def _truncated(logits: Any, top_k: int, top_p: float) -> Any:
    """Logits outside the k likeliest, and outside the smallest set that reaches top_p, at −inf. Shape [V]."""
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.index_fill(0, order[before >= top_p], float("-inf"))
    return logits


class RowStopper:
    """A stopping criterion that says for each row whether it is done, and records why."""

    def __init__(
        self,
        rows: Sequence[Row],
        eos: set[int],
        tokenizer: Any,
        between_tokens: Callable[[], bool],
    ) -> None:
        """
        Args:
            between_tokens: called once a step, while the model computes nothing; returns whether what has been computed
                of unfinished rows is to be computed anew, and so the batch must end here.
        """
        self._rows = rows
        self._eos = eos
        self._tokenizer = tokenizer
        self._between_tokens = between_tokens

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        for row in self._rows:
            if row.stop_reason is None:
                row.stop_reason = "abort" if row.aborted() else self._reason(row)
                if row.on_token is not None:
                    row.on_token(row.tokens[-1], row.stop_reason, row.decoded is not None)
        anew = self._between_tokens()
        done = [anew or row.stop_reason is not None for row in self._rows]
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
        return "length" if len(row.tokens) >= row.most_tokens else None
