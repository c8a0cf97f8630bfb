"""Exit codes, and errors as one line."""

from __future__ import annotations

from twinkle_serve.errors import ServiceError, ServiceNotReadyError, TwinkleServeError

OK = 0
FAILED = 1
"""The service refused the request or failed, or a check did not pass."""
USAGE = 2
"""Unknown command or option, or an invalid value."""
UNREACHABLE = 3
"""The service cannot be reached, or is not ready."""
INTERRUPTED = 130
"""Ctrl-C."""


class CommandError(TwinkleServeError):
    """A command line that asks for what cannot be done."""


def exit_code(error: TwinkleServeError) -> int:
    """Returns the exit code of an error."""
    if isinstance(error, CommandError):
        return USAGE
    return UNREACHABLE if isinstance(error, (ServiceNotReadyError, ServiceError)) else FAILED


def error_line(error: BaseException) -> str:
    """Returns an error as one line. A bug has the name of its type, too."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CommandError) else f"{type(error).__name__}: {text}"
