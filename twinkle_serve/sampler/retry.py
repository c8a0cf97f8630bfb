"""A call that samples and may be sent more than once, because its router may die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray import cloudpickle
from ray.actor import ActorHandle

from twinkle_serve import timing
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.data_format.inputs import PackedInputs, as_list
from twinkle_serve.data_format.prompts import InputDict
from twinkle_serve.data_format.sample_request import Inputs, SampleRequest
from twinkle_serve.errors import DeadlineError, PromptError

RETRY_PAUSES_S = (0.1, 0.3, 1.0, 1.0, 2.0, 2.0, 5.0, 5.0)
"""Pause before each repetition of a call. Their number is limited: the call may be what kills its routers."""


class Attempts:
    """One call that samples, over all its attempts."""

    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self.limit_s = timing.CONTROL_TIMEOUT_S
        """Time for all attempts, in seconds."""
        self.begun = asyncio.Event()
        """Set when the call is sent, or has ended before."""
        self.count = 0
        """Number of repetitions so far."""
        self.may_repeat = True
        """False once what has arrived cannot be sampled again."""
        self._began = time.monotonic()
        self._done: set[int] = set()
        """Indices of the inputs whose responses have arrived."""
        self._cancelled: set[int] | None = set()
        """Indices of cancelled inputs; None: all."""
        self._unread: dict[int, InputDict] | None = None
        """Inputs whose responses are still to come, by index; None before the first response."""

    def begin(self, limit_s: float) -> None:
        """Starts the clock, before the call is sent."""
        self.limit_s, self._began = limit_s, time.monotonic()

    def cancel(self, inputs: Iterable[int] | None) -> None:
        """Excludes inputs from later attempts; None: all."""
        self._cancelled = None if inputs is None or self._cancelled is None else self._cancelled | set(inputs)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.limit_s - (time.monotonic() - self._began)

    @property
    def patience_s(self) -> float:
        """How long to wait for the router, which enforces the deadline itself."""
        return max(0.0, self.left_s) + timing.ROUTER_GRACE_S

    def received(self, response: SampleResponse) -> SampleResponse:
        """Records a response, and adds its inputs."""
        self._done.update(response.prompt_indices)
        packed = self.request.inputs
        if not isinstance(packed, PackedInputs):
            return response
        if self._unread is None:
            self._unread = dict(enumerate(packed.to_list()))
        # Each arrives once; every response gets a dict of its own, also where the caller gave one several times.
        return replace(response, inputs=[dict(self._unread.pop(i)) for i in response.prompt_indices])

    def failed(self, error: BaseException) -> BaseException:
        """Returns the call's error; that of its deadline has the inputs added to its response."""
        if isinstance(error, DeadlineError) and error.response is not None:
            error.response = self.received(error.response)
        return error

    def next_request(self) -> SampleRequest:
        """Returns the request of the next attempt: the missing inputs, within the remaining time."""
        if not self.count:
            return self.request
        cancelled = None if self._cancelled is None else sorted(self._cancelled)
        return replace(self.request, timeout_s=max(0.001, self.left_s), done=sorted(self._done), cancelled=cancelled)


def pack_inputs(inputs: Inputs) -> Inputs:
    """Pickles the inputs of a call as they are now, so that the caller may change them while it runs.

    Inputs that hold references are copied instead: Ray counts the references in arguments that it pickles itself.
    Invalid inputs are left for the router to refuse.

    Raises:
        PromptError: an input cannot be pickled.
    """
    if not (items := as_list(inputs)):
        return inputs
    try:
        return PackedInputs.of(items, _Pickler)
    except PromptError as error:
        if isinstance(error.__cause__, _HoldsReferenceError):
            return [_copied(item) for item in items]
        raise


def _copied(value: Any) -> Any:
    """Copies containers and arrays; references stay, as Ray counts them where it pickles them itself."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.copy()
    return value.detach().clone() if hasattr(value, "detach") and hasattr(value, "clone") else value


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Ray's pickler, without references: it would keep their objects for as long as this process lives."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (ray.ObjectRef, ActorHandle)):
            raise _HoldsReferenceError
        return super().reducer_override(obj)


class _HoldsReferenceError(Exception):
    """An input refers to an object or an actor of Ray."""
