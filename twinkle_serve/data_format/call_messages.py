"""Messages between the clients of a service and its router. Many calls share one."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from twinkle_serve.data_format.sample_request import SampleRequest
from twinkle_serve.data_format.sample_updates import UpdatesItem
from twinkle_serve.data_format.samples import StopReason
from twinkle_serve.errors import RequestError, TwinkleServeError

CallKind: TypeAlias = Literal["run", "run_iter", "run_updates", "run_stream", "control"]
"""The method of `RouterAPI` that a call is of; control: the one that its `ControlCall` names."""

AnswerItem: TypeAlias = UpdatesItem | tuple[str, StopReason | None] | str
"""A response, the begin and the updates of a call, or the new text of a stream; what a control call returns."""

CONTROLS = frozenset({"add_adapter"})
"""Methods that a control call may name: those that return text, and whose caller waits for them to go on."""


@dataclass(frozen=True, slots=True)
class ControlCall:
    """A call of a method of `RouterAPI` that does not sample."""

    method: str
    arguments: tuple[object, ...]


CallRequest: TypeAlias = SampleRequest | ControlCall

PLAIN = "Give plain numbers, text, lists and dicts in sampling_params and the other arguments."


@dataclass(frozen=True, slots=True)
class SentCall:
    """One call."""

    number: int
    """Unique in the session."""
    kind: CallKind
    packed: bytes
    """The pickled request, so that one that cannot be read fails alone."""
    buffers: Sequence[pickle.PickleBuffer] = ()
    """The large argument of a control call."""

    @classmethod
    def pack(cls, number: int, kind: CallKind, request: CallRequest) -> SentCall:
        """Packs a call. Raises exceptions of pickling."""
        if not isinstance(request, ControlCall):  # its arrays would arrive as ones that cannot be written to
            return cls(number, kind, pickle.dumps(request, protocol=5))
        buffers: list[pickle.PickleBuffer] = []
        return cls(number, kind, pickle.dumps(request, protocol=5, buffer_callback=buffers.append), buffers)

    def request(self) -> CallRequest:
        """Returns the request.

        Raises:
            RequestError: it holds an object that cannot be read here.
        """
        try:
            request: CallRequest = pickle.loads(self.packed, buffers=self.buffers)
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
