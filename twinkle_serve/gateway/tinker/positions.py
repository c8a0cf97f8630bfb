"""Logprobs of named tokens, and draws, at positions of a prompt.

Each position is a prompt of its own, the tokens before it, of which one token is sampled: engines have the shorter
prompts in their prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.samples import FloatArray
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.tinker.bodies import TensorBody

NO_TOKEN = -1
"""A cell that asks for nothing."""

MAX_PREFIX_TOKENS = 2**22
"""Tokens of all prompts that a request is turned into."""


@dataclass(frozen=True, slots=True)
class Target:
    """A token to score."""

    cell: int
    """Index in the flat data of the request's tensor, and of the answer's."""
    row: int
    """The token stands at position row + 1 of the prompt."""
    token: int


def targets_of(tensor: TensorBody, prompt_length: int) -> list[Target]:
    """Returns the tokens that `target_prompt_logprobs` names.

    Raises:
        InvalidRequestError: its shape is not [prompt_length - 1, K], it is inconsistent, or it names no token.
    """
    rows = _rows_of_cells(tensor, prompt_length - 1)
    targets = [Target(i, row, token) for i, (row, token) in enumerate(zip(rows, tensor.data, strict=True))]
    named = [target for target in targets if target.token != NO_TOKEN]
    if not named:
        raise InvalidRequestError(
            "target_prompt_logprobs names no token. Name one, or leave it out.", "target_prompt_logprobs"
        )
    return named


def _rows_of_cells(tensor: TensorBody, rows: int) -> Sequence[int]:
    """Returns the row of each cell that the tensor lists. Raises InvalidRequestError."""
    shape, data, crow, columns = tensor.shape, tensor.data, tensor.sparse_crow_indices, tensor.sparse_col_indices
    if len(shape) != 2 or shape[0] != rows or shape[1] < 1:
        raise _inconsistent(f"shape {shape}; a prompt of {rows + 1} tokens takes [{rows}, K]")
    if crow is None and columns is None:
        if len(data) != rows * shape[1]:
            raise _inconsistent(f"{len(data)} values for shape {shape}")
        return [row for row in range(rows) for _ in range(shape[1])]
    if crow is None or columns is None:
        raise _inconsistent("one of sparse_crow_indices and sparse_col_indices, without the other")
    rising = all(low <= high for low, high in pairwise(crow))
    if len(crow) != rows + 1 or crow[0] != 0 or crow[-1] != len(data) or not rising or len(columns) != len(data):
        raise _inconsistent(f"sparse indices that do not fit {len(data)} values of shape {shape}")
    if any(not 0 <= column < shape[1] for column in columns):
        raise _inconsistent(f"a column outside of 0 to {shape[1] - 1}")
    return [row for row in range(rows) for _ in range(crow[row], crow[row + 1])]


def _inconsistent(found: str) -> InvalidRequestError:
    return InvalidRequestError(f"target_prompt_logprobs has {found}.", "target_prompt_logprobs")


@dataclass(frozen=True, slots=True)
class Position:
    """The prompt and parameters by which one position is read."""

    row: int
    params: SamplingParams

    def input(self, prompt: Sequence[int]) -> dict[str, Any]:
        return {"input_ids": list(prompt[: self.row + 1])}


def positions_of(
    targets: Sequence[Target], alternatives: int, prompt_length: int, temperature: float, seed: int | None
) -> list[Position]:
    """Returns what to sample for `target_prompt_logprobs` and `prompt_alt_tokens_k`, by ascending position.

    Args:
        alternatives: number of draws at each position; 0 for none.

    Raises:
        InvalidRequestError: there would be too many tokens.
        SamplingParamsError: more tokens are named at a position than engines take, or an invalid number of draws.
    """
    named: dict[int, dict[int, None]] = {}
    for target in targets:
        named.setdefault(target.row, {})[target.token] = None
    rows = range(prompt_length - 1) if alternatives else sorted(named)
    if (total := sum(row + 1 for row in rows)) > MAX_PREFIX_TOKENS:
        raise InvalidRequestError(
            f"{len(rows)} positions of the prompt are prompts of {total} tokens together; the limit is "
            f"{MAX_PREFIX_TOKENS}. Ask for fewer positions in a request."
        )
    return [
        Position(
            row,
            SamplingParams(
                max_tokens=1,
                ignore_eos=True,
                temperature=temperature if alternatives else 1.0,
                seed=seed if alternatives else None,
                num_samples=max(1, alternatives),
                logprob_token_ids=tuple(named[row]) if row in named else None,
            ),
        )
        for row in rows
    ]


def target_logprobs(response: SampleResponse, targets: Sequence[Target], cells: int) -> FloatArray:
    """Returns the logprob of each cell; 0 where none was asked for.

    Args:
        response: its prompts after the first are positions, in order.
    """
    rows = sorted({target.row for target in targets})
    first_row = dict(zip(*np.unique(response.columns.group, return_index=True), strict=True))
    by_position = {len(response.prompts[group]) - 1: first_row[group] for group in range(1, len(response))}
    scored: dict[int, dict[int, float]] = {}
    for row in rows:
        columns = response.columns.take([int(by_position[row])])
        assert columns.logprobs is not None and columns.logprob_tokens is not None
        scored[row] = dict(zip(columns.logprob_tokens[0].tolist(), columns.logprobs[0].tolist(), strict=True))
    values = np.zeros(cells, np.float32)
    for target in targets:
        values[target.cell] = scored[target.row][target.token]
    return values


def alternatives(response: SampleResponse, count: int) -> tuple[np.ndarray, FloatArray]:
    """Returns the draws at each position, and their logprobs. Shapes [P - 1, count].

    Args:
        response: as of `target_logprobs`, with every position of the prompt.
    """
    drawn = np.flatnonzero(response.columns.group > 0)
    columns = response.columns.take(drawn)
    assert columns.logprobs is not None and (columns.lengths == 1).all()
    shape = (len(response) - 1, count)
    return columns.tokens.astype(np.int64).reshape(shape), columns.logprobs[:, 0].reshape(shape)
