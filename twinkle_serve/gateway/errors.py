"""Errors as HTTP: a status for each type, in the form of each protocol."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from starlette.exceptions import HTTPException

from twinkle_serve import errors
from twinkle_serve.errors import QueueFullError, RequestError, ServiceError, TwinkleServeError, one_line
from twinkle_serve.gateway.keys import ForbiddenError, UnauthorizedError
from twinkle_serve.gateway.public import shown_message

logger = logging.getLogger(__name__)

Protocol: TypeAlias = Literal["openai", "anthropic", "tinker", "native"]
"""A family of clients, each with its own form of errors."""


class HTTPError(RequestError):
    """A request that fails with a status of its own."""

    status = 400
    headers: Mapping[str, str] = {}

    def __init__(self, message: str, param: str | None = None) -> None:
        """
        Args:
            param: path of the field that is invalid.
        """
        super().__init__(message)
        self.param = param


class InvalidRequestError(HTTPError):
    """The body, or a field of it, is invalid."""


class NotFoundError(HTTPError):
    """There is no such path or object."""

    status = 404


class UnknownModelError(NotFoundError):
    """There is no such sampler, adapter or version."""


class MethodNotAllowedError(HTTPError):
    """The path has no such method."""

    status = 405


class NotAcceptableError(HTTPError):
    """The answer has no form that the request accepts."""

    status = 406


class BodyTimeoutError(HTTPError):
    """The body did not arrive in time."""

    status = 408


class ConflictError(HTTPError):
    """The request contradicts the state of the service."""

    status = 409


class GoneError(HTTPError):
    """The object was there, and is not any more."""

    status = 410


class BodyTooLargeError(HTTPError):
    """The body is larger than the limit."""

    status = 413


class MediaTypeError(HTTPError):
    """The body has another content type."""

    status = 415


class UnavailableError(HTTPError):
    """The sampler is starting, or being replaced."""

    status = 503


STATUS: tuple[tuple[type[TwinkleServeError], int], ...] = (
    (UnauthorizedError, 401),
    (ForbiddenError, 403),
    (errors.AdapterError, 404),
    (errors.SessionNotFoundError, 404),
    (errors.SessionGoneError, 410),
    (errors.QueueFullError, 429),
    (errors.DeadlineError, 504),
    (errors.RequestError, 400),
    (errors.TemplateError, 400),
    (errors.LeaseExpiredError, 409),
    (errors.NotOwnerError, 409),
    (errors.ServiceNotReadyError, 503),
    (errors.EngineDeadError, 503),
    (errors.StoreError, 503),
    (errors.EngineError, 503),
    (errors.ServiceError, 503),
)
"""The first type that fits decides."""

OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
OPENAI_CODES = {401: "invalid_api_key", 429: "queue_full", 503: "unavailable", 504: "timeout"}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


UNREACHABLE = "the sampler cannot be reached at the moment. Send the request again."
STARLETTE = {
    404: "no such path. GET /openapi.json lists them.",
    405: "the path does not have this method. GET /openapi.json lists those that it has.",
}
"""Messages instead of Starlette's own."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way to a client."""

    status: int
    message: str
    kind: str
    """Name of the error's type."""
    param: str | None = None
    retry_after_s: float | None = None
    allowed: str | None = None
    """Methods that the path has, where it lacks that of the request."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Converts an exception. A bug is logged, and the client is told no more than that.

        Messages of the service lose what is the operator's own, see `shown_message`.
        """
        if isinstance(error, HTTPError):
            return cls(error.status, str(error), type(error).__name__, error.param)
        if isinstance(error, QueueFullError):
            return cls(429, str(error), type(error).__name__, retry_after_s=error.retry_after_s)
        if isinstance(error, ServiceError):
            logger.warning(one_line(error))
            return cls(503, UNREACHABLE, type(error).__name__)
        if isinstance(error, TwinkleServeError):
            status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
            return cls(status, shown_message(str(error)), type(error).__name__)
        if isinstance(error, HTTPException):  # of Starlette's own routing
            kind = {404: "NotFoundError", 405: "MethodNotAllowedError"}.get(error.status_code, "InvalidRequestError")
            allowed = (error.headers or {}).get("Allow")
            return cls(error.status_code, STARLETTE.get(error.status_code, str(error.detail)), kind, allowed=allowed)
        logger.error(f"a bug in the gateway: {one_line(error)}", exc_info=error)
        return cls(500, "a bug in the gateway; its log has the details.", "InternalError")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.allowed is not None:
            return {"allow": self.allowed}
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        return {"retry-after": "1"} if self.status == 503 else {}

    def body(self, protocol: Protocol) -> dict[str, Any]:
        """Returns the body of the answer, in the protocol's form."""
        match protocol:
            case "openai":
                kind = OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
                unknown_model = self.kind in ("UnknownModelError", "AdapterError")
                code = "model_not_found" if unknown_model else OPENAI_CODES.get(self.status)
                return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}
            case "anthropic":
                kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
                return {"type": "error", "error": {"type": kind, "message": self.message}}
            case "tinker":
                return {
                    "detail": self.message,
                    "error": self.message,
                    "category": "user" if self.status < 500 else "server",
                }
            case "native":
                error = {"type": self.kind, "message": self.message}
                if self.param is not None:
                    error["param"] = self.param
                if self.retry_after_s is not None:
                    error["retry_after_s"] = self.retry_after_s  # type: ignore[assignment]
                return {"error": error}
