"""Errors that Ray wraps on their way between processes."""

from __future__ import annotations

from ray.exceptions import OwnerDiedError, RayActorError, RayTaskError

from twinkle_serve.errors import TwinkleServeError


def raised_error(error: BaseException) -> BaseException | None:
    """Returns the exception that a remote method raised; None where its process is gone instead.

    A TwinkleServeError is returned as it was raised, anything else in Ray's wrapper, which has the remote traceback.
    """
    if not isinstance(error, RayTaskError) or isinstance(error, (RayActorError, OwnerDiedError)):
        return None
    cause = error.cause
    return cause if isinstance(cause, TwinkleServeError) else error
