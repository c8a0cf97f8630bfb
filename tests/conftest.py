"""Shared by every suite."""

from __future__ import annotations

import os

# Before anything imports ray: no reports home, and no colour codes in what tests read.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
