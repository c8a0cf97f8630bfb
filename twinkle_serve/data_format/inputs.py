"""Inputs of a call on their way to the router."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from twinkle_serve.errors import PromptError

RawInput: TypeAlias = Any
"""An input as passed by the caller, not validated: it should be a Trajectory or an InputFeature."""

PIECE = 16
"""Number of inputs pickled together. Unpickling holds the GIL: 16 lists of 32,000 ids take 15 ms."""


class PackedInputs:
    """Inputs as they were when the call was sent, pickled in small batches.

    Calls are unpickled on the event loop that handles every call to the router: 4 ms for 1,000 arrays, several times
    that beside busy threads, and control calls wait behind it. Bytes cost nothing there.
    """

    def __init__(self, pickles: bytes, count: int) -> None:
        """
        Args:
            pickles: batches of PIECE inputs, written by one pickler: objects that they share are in the first only.
            count: number of inputs.
        """
        self._pickles, self._count = pickles, count

    @classmethod
    def of(cls, inputs: Sequence[object], pickler: Callable[[io.BytesIO], pickle.Pickler]) -> PackedInputs:
        """Packs inputs.

        Args:
            inputs: inputs of a call.
            pickler: makes the caller's pickler; classes of its `__main__`, for example, need more than `pickle`.

        Raises:
            PromptError: an input cannot be pickled.
        """
        file = io.BytesIO()
        writer = pickler(file)
        for first in range(0, len(inputs), PIECE):
            try:
                writer.dump(inputs[first : first + PIECE])
            except Exception as error:  # a caller's class may raise anything
                raise _refused("sent", first, len(inputs), error) from error
        return cls(file.getvalue(), len(inputs))

    def __len__(self) -> int:
        return self._count

    @property
    def size_bytes(self) -> int:
        """Size of the pickled inputs."""
        return len(self._pickles)

    def to_list(self) -> list[RawInput]:
        """Unpickles all inputs into a new list.

        Raises:
            PromptError: an input cannot be unpickled here.
        """
        reader = pickle.Unpickler(io.BytesIO(self._pickles))
        inputs: list[RawInput] = []
        while (first := len(inputs)) < self._count:
            try:
                inputs += reader.load()
            except Exception as error:  # a caller's class may raise anything
                raise _refused("read", first, self._count, error) from None
        return inputs


def _refused(what: str, first: int, count: int, error: Exception) -> PromptError:
    which = f"inputs[{first}:{min(first + PIECE, count)}]"
    return PromptError(
        f"{which} cannot be {what}: {type(error).__name__}: {error}. Send plain dicts of lists, text, numpy arrays or "
        "tensors on the CPU."
    )


def as_list(inputs: object) -> list[RawInput] | None:
    """Returns the inputs of a call as a list; a single dict is one input. None if `inputs` is neither.

    Raises:
        PromptError: an input cannot be unpickled here.
    """
    if isinstance(inputs, PackedInputs):
        return inputs.to_list()
    if isinstance(inputs, Mapping):
        return [inputs]
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
        return None
    return list(inputs)
