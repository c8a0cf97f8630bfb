"""How the deployments log."""

from __future__ import annotations

import logging

from ray.serve.schema import LoggingConfig

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""A line for every call hides the rest, and costs the router more than the call."""


def log_to_serve() -> None:
    """Sends the logs of twinkle_serve to Serve's logger: to the replica's log file and the service's terminal."""
    for package in ("twinkle_serve", "deployments"):
        logger = logging.getLogger(package)
        logger.parent = logging.getLogger("ray.serve")
