"""Every error that Twinkle Serve raises on purpose.

TwinkleServeError
├── ConfigError                 the service cannot be what its config says
│   ├── MeshError               a device mesh contradicts itself, its group or the cluster
│   ├── ModelNotFoundError      no model, tokenizer or template at that id or path
│   │   ├── HubUnreachableError   the hub did not answer, and the model is not in the cache
│   │   └── IncompleteModelError  a download that was cut off, or a directory that lacks files
│   ├── TemplateError           a template, or a way to parse tool calls, that does not exist or cannot be
│   ├── EngineArgsError         engine_args that the engine does not have or cannot take
│   └── ServiceNotReadyError    the application is absent, failed or not up in time
├── RequestError                this call cannot be served; the next one can
│   ├── SamplingParamsError     a sampling parameter is wrong, unknown or not supported
│   ├── PromptError             an input is empty, mixed, too long, not of this model, or cannot be sent
│   ├── AdapterError            an adapter is unknown, not of this model, or adapters are switched off
│   ├── WeightsError            weights are not of this model, not finite, or of a version that exists
│   ├── UnsupportedError        this engine, on this device, has no such thing
│   ├── PoisonPromptError       a prompt ended several engines in turn
│   ├── QueueFullError          more waits already than the service takes; it says when to send it again
│   └── DeadlineError           timeout_s passed
├── EngineError                 an engine failed
│   ├── EngineStartError        it could not start
│   ├── EngineDeadError         it died, and its work could not be moved elsewhere
│   │   └── EngineCrashedError    it ended by itself: an error, or a signal of its own
│   └── StoreError              the store of weights cannot be reached, written or trusted
├── ServiceError                the service's router or Serve itself failed, or cannot be reached
├── LeaseExpiredError           a pause or a call was not renewed in time, or another one replaced it
└── WorkerError                 a worker of a remote_class failed

A message says what, both numbers and the remedy. Exceptions take positional arguments only: Ray
rebuilds them from `args` in the caller's process.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class TwinkleServeError(Exception):
    """Root of the tree above."""


class ConfigError(TwinkleServeError):
    """The service cannot be what its config says."""


class MeshError(ConfigError):
    """A device mesh contradicts itself, its group or the cluster."""


class ModelNotFoundError(ConfigError):
    """No model, tokenizer or template at that id or path."""


class HubUnreachableError(ModelNotFoundError):
    """The hub did not answer, and the model is not in the cache."""


class IncompleteModelError(ModelNotFoundError):
    """A download that was cut off, or a directory that lacks files of its model."""


class TemplateError(ConfigError):
    """A template, or a way to parse tool calls, that does not exist or cannot be."""


class EngineArgsError(ConfigError):
    """engine_args that the engine does not have or cannot take."""


class ServiceNotReadyError(ConfigError):
    """The application is absent, failed or not up in time."""


class RequestError(TwinkleServeError):
    """This call cannot be served; the next one can."""


class SamplingParamsError(RequestError):
    """A sampling parameter is wrong, unknown or not supported."""


class PromptError(RequestError):
    """An input is empty, mixed, too long, not of this model, or holds what cannot be sent."""


class AdapterError(RequestError):
    """An adapter is unknown, not of this model, or adapters are switched off."""


class WeightsError(RequestError):
    """Weights are not of this model, not finite, not whole, or of a version that exists."""


class UnsupportedError(RequestError):
    """This engine, on this device, has no such thing."""


class PoisonPromptError(RequestError):
    """A prompt ended several engines in turn, each time as the only suspect."""


class QueueFullError(RequestError):
    """More waits already than the service takes."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)

    @property
    def retry_after_s(self) -> float:
        """Seconds after which there is likely to be room."""
        return float(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


class DeadlineError(RequestError):
    """timeout_s passed."""


class EngineError(TwinkleServeError):
    """An engine failed."""


class EngineStartError(EngineError):
    """An engine could not start."""


class EngineDeadError(EngineError):
    """An engine died, and its work could not be moved elsewhere."""


class EngineCrashedError(EngineDeadError):
    """An engine ended by itself: by an error, or a signal of its own, not by one from outside."""


class StoreError(EngineError):
    """The store of weights cannot be reached, written or trusted."""


class ServiceError(TwinkleServeError):
    """The service's router or Serve itself failed, or cannot be reached."""


class LeaseExpiredError(TwinkleServeError):
    """A pause or a call was not renewed in time, or another one replaced it."""


class WorkerError(TwinkleServeError):
    """A worker of a remote_class failed."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """`unknown WHAT 'NAME', did you mean 'X'? Known: …`, for every place that looks a name up."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(names) or 'none'}"
