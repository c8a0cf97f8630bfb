"""Logging of the deployments."""

from __future__ import annotations

import logging
import os

from ray.serve.schema import LoggingConfig

from twinkle_serve.errors import ConfigError, TwinkleServeError, one_line
from twinkle_serve.remote.errors import raised_error

ENCODING = "TWINKLE_SERVE_LOG_ENCODING"
"""Environment variable of the cluster: JSON or TEXT, of the replicas' log files."""


def quiet(encoding: str) -> LoggingConfig:
    """Returns Serve's configuration of logs. Serve's own messages begin at WARNING: a line for every call hides the
    rest, and costs the router more than the call.

    Args:
        encoding: JSON or TEXT.
    """
    try:
        return LoggingConfig(log_level="WARNING", enable_access_log=False, encoding=encoding.upper())
    except ValueError:
        raise ConfigError(f"{ENCODING} must be JSON or TEXT, got {encoding!r}.") from None


QUIET = quiet(os.environ.get(ENCODING, "TEXT"))

REQUEST_FAILED = "Request failed."
"""Serve's message, with a traceback, when a call raises (ray 2.60, serve/_private/replica.py)."""


def log_to_serve(*, refusals: bool) -> None:
    """Sends the logs of twinkle_serve, from INFO on, to Serve's logger: to the replica's log file and the service's
    terminal. A TwinkleServeError that a call raises is logged in one line, without a traceback.

    Args:
        refusals: False drops that line where only the router calls, which logs the error itself.
    """
    serve = logging.getLogger("ray.serve")
    for package in ("twinkle_serve", "deployments"):
        logger = logging.getLogger(package)
        logger.parent = serve
        logger.setLevel(logging.INFO)
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
