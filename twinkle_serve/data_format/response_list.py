"""A response that is also a list of responses, as Twinkle's samplers return."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from twinkle_serve.conventions import follows_twinkle
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.samples import SampleColumns
from twinkle_serve.data_format.sequence import SampledSequence
from twinkle_serve.errors import DeadlineError


class ResponseList(list[SampleResponse], SampleResponse):
    """The response to a call as a list with the response to each prompt.

    Guarantees:
        `sequences` and `to_training_batch` are of the items in the list. Once the list has been changed, whatever else
        belongs to the call as a whole raises.
    """

    def __init__(self, response: SampleResponse) -> None:
        """
        Args:
            response: the response to the call.
        """
        super().__init__([response] if len(response) == 1 else response)
        self._call, self._items = response, tuple(self)

    def _is_unchanged(self) -> bool:
        return len(self) == len(self._items) and all(map(operator.is_, self, self._items))

    def whole(self) -> SampleResponse:
        """Returns the response to the call.

        Raises:
            ValueError: the list has been changed.
        """
        if not self._is_unchanged():
            raise ValueError("this list of responses has been changed since the call. Read its items.")
        return self._call

    @property
    def sequences(self) -> Sequence[SampledSequence]:
        return self._call.sequences if self._is_unchanged() else [s for response in self for s in response.sequences]

    def _parts(self) -> Sequence[SampleResponse]:
        return [self._call] if self._is_unchanged() else list(self)

    @property
    def columns(self) -> SampleColumns:  # type: ignore[override]  # not to be set
        return self.whole().columns

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def __reduce__(self) -> tuple[object, ...]:
        return (ResponseList, (self._call,)) if self._is_unchanged() else (list, (list(self),))

    __hash__ = SampleResponse.__hash__  # type: ignore[assignment]
    __repr__ = SampleResponse.__repr__


def as_called(response: SampleResponse) -> SampleResponse:
    """Returns a response as its caller expects it: where defaults are Twinkle's, as a list."""
    return ResponseList(response) if follows_twinkle() else response


def as_raised(error: DeadlineError) -> DeadlineError:
    """Returns a call's error with its response as the caller expects it.

    It has no traceback: the frames that it came through hold everything of the call.
    """
    if error.response is not None:
        error.response = as_called(error.response)
    return error.with_traceback(None)
