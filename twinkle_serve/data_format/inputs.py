"""Inputs of a call on their way to the router, and as the caller reads them in the response."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

from twinkle_serve.errors import PromptError

PIECE = 16
"""Inputs that are pickled together. Unpickling keeps Python's lock: 16 lists of 32,000 ids are 15 ms."""


class PackedInputs(Sequence[Any]):
    """Inputs as they were when the call was made, pickled a few at a time.

    Ray unpickles the arguments of calls on the event loop that every call to the router passes through: 4 ms for 1,000
    arrays, several times that beside busy threads, and control calls wait behind it. Bytes cost nothing there. What is
    read is unpickled, and kept.
    """

    def __init__(
        self, pieces: Sequence[bytes], indices: Sequence[int], read: dict[int, list[Any]] | None = None
    ) -> None:
        """
        Args:
            pieces: PIECE inputs each, pickled.
            indices: which of these it has; a range has all.
            read: pieces by their numbers, where some have been unpickled already.
        """
        self._pieces, self._indices = pieces, indices
        self._read = {} if read is None else read

    @classmethod
    def of(cls, inputs: Sequence[Any], dumps: Callable[[Any], bytes]) -> PackedInputs:
        """
        Raises:
            PromptError: they cannot be pickled.
        """
        inputs = list(inputs)  # not every sequence can be sliced
        try:
            pieces = [dumps(inputs[i : i + PIECE]) for i in range(0, len(inputs), PIECE)]
        except Exception as error:  # whatever a caller's own class raises
            raise PromptError(f"inputs cannot be sent to the service: {type(error).__name__}: {error}") from error
        return cls(pieces, range(len(inputs)))

    def select(self, indices: Iterable[int]) -> PackedInputs:
        """Some of these, in the given order."""
        return PackedInputs(self._pieces, [self._indices[i] for i in indices], self._read)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> PackedInputs: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        number, place = divmod(self._indices[index], PIECE)
        if number not in self._read:
            self._read[number] = self._unpacked(number)
        return self._read[number][place]

    def unpack(self) -> list[Any]:
        """All of them, in a list of the reader's own; none is kept here.

        Raises:
            PromptError: this process cannot unpickle them.
        """
        pieces = {number: self._unpacked(number) for number in {i // PIECE for i in self._indices}}
        return [pieces[i // PIECE][i % PIECE] for i in self._indices]

    def _unpacked(self, number: int) -> list[Any]:
        try:
            piece: list[Any] = pickle.loads(self._pieces[number])
        except Exception as error:  # whatever a caller's own class raises
            first = number * PIECE
            raise PromptError(
                f"one of inputs[{first}:{first + PIECE}] cannot be read in the service: {type(error).__name__}: "
                f"{error}. Send plain dicts of lists, text or numpy arrays."
            ) from None
        return piece

    def __reduce__(self) -> Any:
        if isinstance(self._indices, range):
            return PackedInputs, (self._pieces, self._indices)
        return list, (self.unpack(),)  # the others' need not travel


def pack(inputs: Any, dumps: Callable[[Any], bytes]) -> Any:
    """Inputs of a call, packed; what is none is left for the router to refuse. One dict is one input."""
    if isinstance(inputs, Mapping):
        inputs = [inputs]
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence) or not inputs:
        return inputs
    return PackedInputs.of(inputs, dumps)


def unpacked(inputs: Any) -> Any:
    """Inputs of a call, however they came."""
    return inputs.unpack() if isinstance(inputs, PackedInputs) else inputs
