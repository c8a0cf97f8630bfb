"""Draws and ends the samples of the torch engine's batch, each by its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle_serve.data_format.samples import FloatArray, StopReason
from twinkle_serve.engines.drawing import DrawnSample
from twinkle_serve.engines.logits import softmax

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(slots=True, kw_only=True)
class Row(DrawnSample):
    """One sample in the running batch."""

    generator: Generator
    """The sample's own."""
    aborted: Callable[[], bool]
    """Whether the sample was cancelled, aborted or has run out of time."""
    on_token: Callable[[int, StopReason | None, bool], None] | None = None
    """Called with each token; for the last one with its stop reason, and whether a stop string cut the text."""

    def draw(self, raw: FloatArray) -> int:
        """Draws the next token.

        Args:
            raw: the model's logits, shape [V].
        """
        import torch

        logits = self.process(raw, self.tokens)
        if self.params.greedy:
            token = int(logits.argmax())
        else:
            # The exponential race: argmax of p / Exp(1) is a draw from p.
            noise = torch.empty(len(logits)).exponential_(generator=self.generator).numpy()
            token = int((softmax(logits) / noise).argmax())
        self.add(token, raw, logits)
        return token


class RowSampler:
    """A logits processor that samples each row with its own parameters and random generator.

    It returns logits with one finite entry per row.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        import torch

        values: FloatArray = logits.float().cpu().numpy()
        forced = torch.full_like(logits, float("-inf"), device="cpu")
        for i, row in enumerate(self._rows):
            forced[i, 0 if row.stop_reason is not None else row.draw(values[i])] = 0.0
        return forced.to(input_ids.device)


class RowStopper:
    """A stopping criterion that reports which rows are done, and records their stop reasons."""

    def __init__(self, rows: Sequence[Row], between_tokens: Callable[[], bool]) -> None:
        """
        Args:
            between_tokens: called once per step, while the model is idle; returns whether the batch must end here
                because its unfinished rows must be recomputed.
        """
        self._rows = rows
        self._between_tokens = between_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        import torch

        for row in self._rows:
            if row.stop_reason is None:
                row.end(aborted=row.aborted())
                if row.on_token is not None:
                    row.on_token(row.tokens[-1], row.stop_reason, row.by_stop_string)
        stale = self._between_tokens()
        done = [stale or row.stop_reason is not None for row in self._rows]
        return torch.tensor(done, device=input_ids.device)
