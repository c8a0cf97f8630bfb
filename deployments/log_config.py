"""Logging of the deployments."""

from __future__ import annotations

import logging

from ray.serve.schema import LoggingConfig

from twinkle_serve.errors import TwinkleServeError, one_line
from twinkle_serve.remote.errors import raised_error

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""A line for every call hides the rest, and costs the router more than the call."""

REQUEST_FAILED = "Request failed."
"""Serve's message, with a traceback, when a call raises (ray 2.60, serve/_private/replica.py)."""


def log_to_serve(*, refusals: bool) -> None:
    """Sends the logs of twinkle_serve to Serve's logger: to the replica's log file and the service's terminal. A
    TwinkleServeError that a call raises is logged in one line, without a traceback.

    Args:
        refusals: False drops that line where only the router calls, which logs the error itself.
    """
    serve = logging.getLogger("ray.serve")
    for package in ("twinkle_serve", "deployments"):
        logging.getLogger(package).parent = serve
    for present in list(serve.filters):
        if isinstance(present, OneLineErrors):
            serve.removeFilter(present)
    serve.addFilter(OneLineErrors(refusals))


class OneLineErrors(logging.Filter):
    """Logs a TwinkleServeError as its type and message. Other exceptions are bugs and keep their traceback."""

    def __init__(self, refusals: bool) -> None:
        super().__init__()
        self._refusals = refusals

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            error = raised_error(error) or error
        if not isinstance(error, TwinkleServeError):
            return True
        message = record.getMessage()
        if message == REQUEST_FAILED and not self._refusals:
            return False
        record.msg = f"call failed: {one_line(error)}" if message == REQUEST_FAILED else f"{message} {one_line(error)}"
        record.args = None
        record.exc_info = record.exc_text = None
        if message == REQUEST_FAILED:
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True
