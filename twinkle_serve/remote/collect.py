"""Joins the answers of several workers into one result."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from twinkle_serve.errors import RequestError
from twinkle_serve.mesh import DeviceMesh
from twinkle_serve.remote.dispatch import Collect
from twinkle_serve.remote.lazy import Value


def collect(method: Collect, answers: Sequence[Value], *, single: bool, mesh: DeviceMesh) -> Value:
    """Joins answers to the result of a call.

    The result of `flatten`, `mean` and `sum` is the same as that of one worker with the whole batch: they recurse into
    dicts and tuples, and return the answer of a single worker unchanged. `mean` weighs workers equally, however many
    items each had.

    Args:
        method: a method of `remote_function`, or a function of (answers, mesh).
        answers: answers in the order of the data, without repetitions.
        single: whether only one worker answers, for any batch.
        mesh: mesh of the workers.

    Raises:
        RequestError: answers of a type that the method cannot join.
    """
    if callable(method):
        return method(list(answers), mesh)
    if method in ("none", "last_pp"):
        return answers[0] if single and answers else list(answers)
    if not answers:
        return []
    if method in ("first", "last_pp_first") or len(answers) == 1:
        return answers[0]
    return _join("mean" if method == "avg" else method, answers)


def _join(method: str, answers: Sequence[Value]) -> Value:
    first = answers[0]
    kinds = {type(answer) for answer in answers}
    if first is None and kinds == {type(None)}:
        return None
    if all(isinstance(answer, dict) for answer in answers):
        if any(answer.keys() != first.keys() for answer in answers):
            keys = [sorted(map(str, answer)) for answer in answers]
            raise RequestError(f"collect={method!r} joins dicts with the same keys, workers returned {keys}.")
        return {key: _join(method, [answer[key] for answer in answers]) for key in first}
    if all(isinstance(answer, tuple) and len(answer) == len(first) for answer in answers) and len(kinds) == 1:
        items = [_join(method, item) for item in zip(*answers, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
    join = _concatenate if method == "flatten" else _add
    joined = join(answers)
    if joined is None:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        takes = "lists and arrays" if method == "flatten" else "numbers and arrays"
        raise RequestError(
            f"collect={method!r} joins {takes}, and dicts and tuples of them, workers returned {names}. "
            "Use collect='none' or a function."
        )
    return joined / len(answers) if method == "mean" else joined


def _concatenate(answers: Sequence[Value]) -> Value:
    if all(isinstance(answer, list) for answer in answers):
        return [item for answer in answers for item in answer]
    if all(isinstance(answer, np.ndarray) and answer.ndim for answer in answers):
        return np.concatenate(answers)
    torch = sys.modules.get("torch")
    if torch is not None and all(isinstance(answer, torch.Tensor) and answer.ndim for answer in answers):
        return torch.cat(list(answers))
    return None


def _add(answers: Sequence[Value]) -> Value:
    torch = sys.modules.get("torch")
    numeric: tuple[type, ...] = (int, float, complex, np.ndarray, np.number)
    if torch is not None:
        numeric += (torch.Tensor,)
    if not all(isinstance(answer, numeric) for answer in answers):
        return None
    shapes = {getattr(answer, "shape", ()) for answer in answers}
    if len(shapes) > 1:
        raise RequestError(f"sum and mean are elementwise, workers returned the shapes {sorted(map(tuple, shapes))}.")
    return sum(answers[1:], start=answers[0])
