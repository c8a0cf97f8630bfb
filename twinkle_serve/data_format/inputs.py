"""Inputs of a call on their way to the router."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twinkle_serve.errors import PromptError

PIECE = 16
"""Inputs that are pickled together. Unpickling keeps Python's lock: 16 lists of 32,000 ids are 15 ms."""


class PackedInputs:
    """Inputs as they were when the call was sent, pickled a few at a time.

    Ray unpickles the arguments of calls on the event loop that every call to the router passes through: 4 ms for 1,000
    arrays, several times that beside busy threads, and control calls wait behind it. Bytes cost nothing there.
    """

    def __init__(self, pickles: bytes, count: int) -> None:
        """
        Args:
            pickles: PIECE inputs each, one after the other, by one pickler: what all share is in the first alone.
            count: how many inputs there are.
        """
        self._pickles, self._count = pickles, count

    @classmethod
    def of(cls, inputs: Sequence[Any], pickler: Callable[[io.BytesIO], pickle.Pickler]) -> PackedInputs:
        """
        Args:
            pickler: the caller's: classes of its `__main__`, for one, need more than `pickle` has.

        Raises:
            PromptError: some cannot be pickled.
        """
        file = io.BytesIO()
        made = pickler(file)
        for first in range(0, len(inputs), PIECE):
            try:
                made.dump(inputs[first : first + PIECE])
            except Exception as error:  # whatever a caller's own class raises
                raise _refused("sent", first, len(inputs), error) from error
        return cls(file.getvalue(), len(inputs))

    def __len__(self) -> int:
        return self._count

    def to_list(self) -> list[Any]:
        """All of them, in a list of the reader's own.

        Raises:
            PromptError: some cannot be unpickled here.
        """
        made = pickle.Unpickler(io.BytesIO(self._pickles))
        inputs: list[Any] = []
        while (first := len(inputs)) < self._count:
            try:
                inputs += made.load()
            except Exception as error:  # whatever a caller's own class raises
                raise _refused("read", first, self._count, error) from None
        return inputs


def _refused(what: str, first: int, count: int, error: Exception) -> PromptError:
    which = f"inputs[{first}:{min(first + PIECE, count)}]"
    return PromptError(
        f"{which} cannot be {what}: {type(error).__name__}: {error}. Send plain dicts of lists, text, numpy arrays or "
        "tensors on the CPU."
    )


def as_list(inputs: Any) -> list[Any] | None:
    """Inputs of a call one by one, where one dict is one input; None if they are no inputs at all.

    Raises:
        PromptError: as `PackedInputs.to_list`.
    """
    if isinstance(inputs, PackedInputs):
        return inputs.to_list()
    if isinstance(inputs, Mapping):
        return [inputs]
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
        return None
    return list(inputs)
