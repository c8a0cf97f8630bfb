"""Tells the `notifier` of `initialize` about exceptions of remote functions."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator

from twinkle_serve.remote.session import session

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def notifying(function: str) -> Iterator[None]:
    """Sends an exception that leaves the block to the notifier of this process, once, and raises it.

    Args:
        function: name of the remote function.
    """
    try:
        yield
    except Exception as error:
        if session.notifier is not None and not any(error is known for known in session.notified):
            session.notified.append(error)
            _send(function, error)
        raise


def _send(function: str, error: Exception) -> None:
    run = f"run {session.name!r}" if session.name else "a run without a name"
    trace = "".join(traceback.format_exception(error))
    try:
        assert session.notifier is not None
        session.notifier(f"{function} of {run} failed: {type(error).__name__}: {error}\n\n{trace}")
    except Exception:  # a notifier of the user's must not replace the error
        logger.exception("the notifier of initialize failed")
