"""How the deployments log."""

from __future__ import annotations

from ray.serve.schema import LoggingConfig

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""A line for every call hides what matters, and costs the router more than the call."""
