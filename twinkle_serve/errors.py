"""All errors that Twinkle Serve raises deliberately.

    TwinkleServeError
    ├── ConfigError                   invalid configuration
    │   ├── MeshError                 a device mesh or group is inconsistent, or does not fit its group or the cluster
    │   ├── ModelNotFoundError        no model, tokenizer or template at that id or path
    │   │   ├── HubUnreachableError   the hub did not answer, and the model is not in the cache
    │   │   └── IncompleteModelError  an interrupted download, or a directory with missing files
    │   ├── TemplateError             an unknown or invalid template or tool-call parser
    │   ├── EngineArgsError           engine_args that the engine does not have or does not accept
    │   ├── NotOwnerError             the application belongs to another job, or to `serve`
    │   └── ServiceNotReadyError      the application is absent, failed, or not up in time
    ├── RequestError                  this call cannot be served; the next one can
    │   ├── SamplingParamsError       a sampling parameter is invalid, unknown or unsupported
    │   ├── PromptError               an input is invalid, too long or of another model, or cannot be sent
    │   ├── AdapterError              an adapter is unknown, invalid or of another model, or LoRA is switched off
    │   ├── WeightsError              weights are of another model, incomplete or not finite, or their version exists
    │   ├── UnsupportedError          the engine does not support this on its device
    │   ├── PoisonPromptError         a prompt crashed several engines in turn
    │   ├── SessionError              a request about a session is invalid
    │   │   ├── SessionNotFoundError  no session has this id
    │   │   └── SessionGoneError      the session has ended: deleted, expired or evicted
    │   ├── QueueFullError            the queue is full; `retry_after_s` says when to send the call again
    │   └── DeadlineError             timeout_s elapsed; `response` has what was finished
    ├── EngineError                   an engine failed
    │   ├── EngineStartError          it could not start
    │   ├── EngineDeadError           it died, and its work could not be moved to another engine
    │   │   └── EngineCrashedError    it ended by itself: by an exception, or a signal of its own
    │   └── StoreError                the weight store cannot be reached or written, or its files are damaged
    ├── ServiceError                  the router or Serve itself cannot be reached, did not answer, or failed by a bug
    ├── LeaseExpiredError             the lease of a pause or a call expired, or another call with its id replaced it
    └── WorkerError                   a worker of a remote_class failed

A message says what is wrong, with both numbers and the remedy. Exceptions take positional arguments only: Ray rebuilds
them from `args` in the caller's process.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinkle_serve.data_format.response import SampleResponse


class TwinkleServeError(Exception):
    """Root of the tree above."""


class ConfigError(TwinkleServeError):
    """Invalid configuration."""


class MeshError(ConfigError):
    """A device mesh or group is inconsistent, or does not fit its group or the cluster."""


class ModelNotFoundError(ConfigError):
    """No model, tokenizer or template at that id or path."""


class HubUnreachableError(ModelNotFoundError):
    """The hub did not answer, and the model is not in the cache."""


class IncompleteModelError(ModelNotFoundError):
    """An interrupted download, or a directory with missing files of its model."""


class TemplateError(ConfigError):
    """An unknown or invalid template or tool-call parser."""


class EngineArgsError(ConfigError):
    """engine_args that the engine does not have or does not accept."""


class NotOwnerError(ConfigError):
    """An application would be replaced or deleted that another running job, or `serve`, has deployed."""


class ServiceNotReadyError(ConfigError):
    """The application is absent, failed, or not up in time."""


class RequestError(TwinkleServeError):
    """This call cannot be served; the next one can."""


class SamplingParamsError(RequestError):
    """A sampling parameter is invalid, unknown or unsupported."""


class PromptError(RequestError):
    """An input is empty or invalid, of another kind than the others, too long, of another model, or cannot be sent."""


class AdapterError(RequestError):
    """An adapter is unknown, invalid or of another model, or LoRA is switched off."""


class WeightsError(RequestError):
    """Weights are of another model, incomplete or not finite, or their version exists already."""


class UnsupportedError(RequestError):
    """The engine does not support this on its device."""


class PoisonPromptError(RequestError):
    """A prompt was running on several engines as they ended, the last time as the only suspect."""


class SessionError(RequestError):
    """A request about a session is invalid."""


class SessionNotFoundError(SessionError):
    """No session has this id."""


class SessionGoneError(SessionError):
    """The session has ended: it was deleted, its lease expired, or it was evicted. Its id cannot be used again."""


class QueueFullError(RequestError):
    """The queue is full."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)

    @property
    def retry_after_s(self) -> float:
        """Seconds until the queue is likely to have room."""
        return float(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


class DeadlineError(RequestError):
    """timeout_s elapsed."""

    def __init__(self, message: str, response: SampleResponse | None = None) -> None:
        super().__init__(message)
        # An attribute, not a property of `args`: Ray's wrapper has args of its own, and passes attributes on.
        self.response = response
        """The prompts that were complete, as `min_groups` returns them. None if there were none, if the router did not
        say so itself, and for `sample_iter`, which has yielded them, text streams and control calls."""


class EngineError(TwinkleServeError):
    """An engine failed."""


class EngineStartError(EngineError):
    """An engine could not start."""


class EngineDeadError(EngineError):
    """An engine died or was shut down. Callers see it only where its work could not be moved to another one."""


class EngineCrashedError(EngineDeadError):
    """An engine ended by itself: by an exception or a signal of its own, not by one from outside."""


class StoreError(EngineError):
    """The weight store cannot be reached or written, or its files are damaged."""


class ServiceError(TwinkleServeError):
    """The service's router or Serve itself cannot be reached, did not answer, or failed by a bug."""


class LeaseExpiredError(TwinkleServeError):
    """The lease of a pause or of a call expired, or a call was replaced by another with its id."""


class WorkerError(TwinkleServeError):
    """A worker of a remote_class failed."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """Message for a name that is not in a registry: `unknown WHAT 'NAME', did you mean 'X'? Known: …`."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(names) or 'none'}"


def one_line(error: BaseException) -> str:
    """Returns type and message of an error without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
