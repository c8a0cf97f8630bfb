"""State of the gateway that its routes share."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from twinkle_serve.data_format.metrics import MetricsSink
from twinkle_serve.gateway.config import GatewayArgs, LimitArgs
from twinkle_serve.gateway.errors import InvalidRequestError
from twinkle_serve.gateway.keys import Caller, Keys
from twinkle_serve.gateway.samplers import Samplers
from twinkle_serve.traces import Traces

TIMEOUT_HEADER = "x-timeout-s"
"""Deadline of a request in seconds, queueing included, for clients whose protocol has no field for it."""


@dataclass(frozen=True, slots=True)
class GatewayContext:
    """What every route of one gateway process needs."""

    args: GatewayArgs
    keys: Keys
    samplers: Samplers
    sink: MetricsSink | None = None
    """Takes the metrics of its requests."""
    traces: Traces | None = None
    """Records its requests."""

    @property
    def limits(self) -> LimitArgs:
        return self.args.limits

    def timeout_s(self, request: Request) -> float | None:
        """Returns the deadline of a request; None: the sampler's own.

        Raises:
            InvalidRequestError: the header is not a number of seconds.
        """
        given = request.headers.get(TIMEOUT_HEADER)
        if given is None:
            return self.args.request_timeout_s
        try:
            seconds = float(given)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise InvalidRequestError(f"{TIMEOUT_HEADER} must be a number of seconds above 0, got {given!r}.")
        return seconds

    def require_prompts(self, count: int, samples: int, fields: tuple[str, str] = ("prompt", "n")) -> None:
        """Raises InvalidRequestError if a request has more prompts, or more samples of each, than the limits allow.

        Args:
            fields: names of both in the request.
        """
        if count > self.limits.prompts:
            raise InvalidRequestError(
                f"the request has {count} prompts; limits.prompts is {self.limits.prompts}. Send several requests.",
                fields[0],
            )
        if samples > self.limits.samples:
            raise InvalidRequestError(
                f"the request asks for {fields[1]}={samples} samples of each prompt; limits.samples is "
                f"{self.limits.samples}. Send several requests.",
                fields[1],
            )


SESSION_HEADER = "x-session-id"

SESSION_PREFIXES = ("", "/session/{session}")
"""Prefixes of the routes that take part in sessions."""


def session_of(request: Request, field: str | None = None) -> str | None:
    """Returns the id of the session that a request is part of: of its path, its header, or a field of its body.

    Raises:
        InvalidRequestError: two of them name different sessions.
    """
    given = (request.path_params.get("session"), request.headers.get(SESSION_HEADER), field)
    names = {name for name in given if name is not None}
    if len(names) > 1:
        raise InvalidRequestError(f"the request names several sessions: {', '.join(sorted(names))}. Name one.")
    return names.pop() if names else None


def caller_of(request: Request) -> Caller:
    """Returns the holder of the key that a request came with."""
    caller: Caller = request.scope["twinkle_serve.caller"]
    return caller
