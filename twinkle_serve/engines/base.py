"""Moved to `protocol` and `group_runner`."""

from twinkle_serve.engines.group_runner import *  # noqa: F403
from twinkle_serve.engines.protocol import *  # noqa: F403
