"""The defaults in which Twinkle's sampler differs from this one, as a switch of this process.

`import twinkle_serve.as_twinkle` sets it. docs/migrating.md lists the defaults.
"""

from __future__ import annotations

_twinkle = False


def follow_twinkle(follow: bool = True) -> None:
    """Sets whether defaults in this process are Twinkle's or this package's own."""
    global _twinkle
    _twinkle = follow


def follows_twinkle() -> bool:
    """Whether defaults in this process are Twinkle's."""
    return _twinkle
