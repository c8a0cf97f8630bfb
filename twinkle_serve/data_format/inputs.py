"""Inputs of a call on their way to the router."""

from __future__ import annotations

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

    def __init__(self, pieces: Sequence[bytes], count: int) -> None:
        """
        Args:
            pieces: PIECE inputs each, pickled.
            count: how many inputs there are.
        """
        self._pieces, self._count = pieces, count
        self._read: dict[int, list[Any]] = {}
        """Pieces that have been read here, by their numbers."""

    @classmethod
    def of(cls, inputs: Sequence[Any], dumps: Callable[[Any], bytes]) -> PackedInputs:
        """
        Args:
            dumps: pickles in the caller's way: classes of its `__main__`, for one, need more than `pickle` has.
        """
        return cls([dumps(inputs[i : i + PIECE]) for i in range(0, len(inputs), PIECE)], len(inputs))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        """One of them; what was read with it is kept, for those that are read next."""
        number, place = divmod(index, PIECE)
        if number not in self._read:
            self._read[number] = self._unpickled(number)
        return self._read[number][place]

    def to_list(self) -> list[Any]:
        """All of them; none is kept here.

        Raises:
            PromptError: they cannot be unpickled here.
        """
        return [item for number in range(len(self._pieces)) for item in self._unpickled(number)]

    def _unpickled(self, number: int) -> list[Any]:
        try:
            piece: list[Any] = pickle.loads(self._pieces[number])
        except Exception as error:  # whatever a caller's own class raises
            first, end = number * PIECE, min(self._count, (number + 1) * PIECE)
            raise PromptError(
                f"inputs[{first}:{end}] cannot be read in the service: {type(error).__name__}: {error}. Send plain "
                "dicts of lists, text, numpy arrays or tensors on the CPU."
            ) from None
        return piece

    def __reduce__(self) -> Any:
        return PackedInputs, (self._pieces, self._count)


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
