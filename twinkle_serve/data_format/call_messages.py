"""Messages between the clients of a service and its router. Many calls share one."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from twinkle_serve.data_format.inputs import PackedInputs
from twinkle_serve.data_format.response import SampleResponse
from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.errors import RequestError, TwinkleServeError

CallKind: TypeAlias = Literal["run", "run_iter", "run_stream"]
"""The method of `RouterAPI` that a call is of."""

AnswerItem: TypeAlias = SampleResponse | tuple[str, StopReason | None]
"""A response, or the new text of a stream."""

OUT_OF_BAND_BYTES = 2**14
"""Arrays of this size are not copied on their way."""


PLAIN = "Give plain numbers, text, lists and dicts in sampling_params and the other arguments."


@dataclass(frozen=True, slots=True)
class SentCall:
    """One call."""

    number: int
    """Unique in the session."""
    kind: CallKind
    packed: SampleRequest | bytes
    """Pickled where its inputs are, so that a request that cannot be read fails alone."""

    @classmethod
    def pack(cls, number: int, kind: CallKind, request: SampleRequest) -> SentCall:
        """Packs a call. One whose inputs hold references is left to Ray, which counts them."""
        packed = pickle.dumps(request, protocol=5) if isinstance(request.inputs, PackedInputs) else request
        return cls(number, kind, packed)

    def request(self) -> SampleRequest:
        """Returns the request.

        Raises:
            RequestError: it holds an object that cannot be read here.
        """
        if isinstance(self.packed, SampleRequest):
            return self.packed
        try:
            request: SampleRequest = pickle.loads(self.packed)
        except Exception as error:  # a caller's class may raise anything
            raise RequestError(
                f"the call cannot be read by the router: {type(error).__name__}: {error}. {PLAIN}"
            ) from None
        return request


@dataclass(frozen=True, slots=True)
class CallMessage:
    """A message from a client."""

    calls: Sequence[SentCall] = ()
    abandoned: Sequence[int] = ()
    """Calls whose callers no longer wait, by number."""
    last: bool = False
    """Whether the client sends no more messages in this session."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One item of a call, or its end, or both."""

    call: int
    """Number of the call."""
    item: AnswerItem | None = None
    error: TwinkleServeError | None = None
    """The error that the call ended with."""
    last: bool = False
    """Whether the call is over."""


@dataclass(frozen=True, slots=True)
class Answers:
    """A message to a client."""

    received: int
    """Number of messages that the router has taken in this session."""
    packed: Any
    """See `pack` and `unpack`."""

    @classmethod
    def pack(cls, received: int, answers: Sequence[Answer]) -> Answers:
        """Pickles answers in about half of the time that Ray takes; their large arrays are not copied.

        Answers with inputs are left to Ray, which counts the references in them.
        """
        if any(isinstance(answer.item, SampleResponse) and answer.item.inputs for answer in answers):
            return cls(received, list(answers))
        buffers: list[pickle.PickleBuffer] = []

        def in_band(buffer: pickle.PickleBuffer) -> bool:
            if buffer.raw().nbytes < OUT_OF_BAND_BYTES:
                return True
            buffers.append(buffer)
            return False

        pickled = pickle.dumps(list(answers), protocol=5, buffer_callback=in_band)
        return cls(received, (pickled, buffers))

    def unpack(self) -> list[Answer]:
        """Returns the answers."""
        if isinstance(self.packed, list):
            return self.packed
        pickled, buffers = self.packed
        answers: list[Answer] = pickle.loads(pickled, buffers=buffers)
        return answers
